"""Cache of responses on disk: reading, concurrent processes, and files left by a kill."""

from pathlib import Path

from tokengrow.evaluation.response_cache import ResponseCache


def test_later_cache_reads_stored_response(tmp_path: Path) -> None:
    with ResponseCache(tmp_path / "model") as first:
        first.add("loglikelihood", ("a", " b"), (-1.0000000000000002, True))
    with ResponseCache(tmp_path / "model") as later:
        assert later.get("loglikelihood", ("a", " b")) == [-1.0000000000000002, True]
        assert later.get("loglikelihood", ("a", " c")) is None
        assert later.get("generate_until", ("a", " b")) is None


def test_concurrent_processes_write_separate_files(tmp_path: Path) -> None:
    with ResponseCache(tmp_path) as first, ResponseCache(tmp_path) as second:
        first.add("loglikelihood_rolling", ("a",), -1.5)
        second.add("loglikelihood_rolling", ("b",), -2.5)
    assert len(list(tmp_path.iterdir())) == 2
    with ResponseCache(tmp_path) as later:
        assert [later.get("loglikelihood_rolling", (text,)) for text in "ab"] == [-1.5, -2.5]


def test_response_is_on_disk_as_soon_as_it_is_added(tmp_path: Path) -> None:
    with ResponseCache(tmp_path) as cache:
        cache.add("loglikelihood_rolling", ("a",), -1.5)
        assert ResponseCache(tmp_path).get("loglikelihood_rolling", ("a",)) == -1.5


def test_truncated_line_is_skipped(tmp_path: Path) -> None:
    with ResponseCache(tmp_path) as cache:
        for text in "ab":
            cache.add("loglikelihood_rolling", (text,), -1.5)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    with ResponseCache(tmp_path) as later:
        responses = [later.get("loglikelihood_rolling", (text,)) for text in "ab"]
    assert responses == [-1.5, None]


def test_without_a_directory_nothing_is_stored() -> None:
    cache = ResponseCache()
    cache.add("loglikelihood_rolling", ("a",), -1.5)
    assert cache.get("loglikelihood_rolling", ("a",)) is None
