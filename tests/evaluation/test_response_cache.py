"""Answers on the disk: what is known, by whom it was written, what a kill leaves."""

from pathlib import Path

from tokengrow.evaluation.response_cache import ResponseCache


def test_an_answer_is_known_to_whoever_opens_the_folder_later(tmp_path: Path) -> None:
    with ResponseCache(tmp_path / "model") as here:
        here.add("loglikelihood", ("a", " b"), (-1.0000000000000002, True))
    with ResponseCache(tmp_path / "model") as later:
        assert later.get("loglikelihood", ("a", " b")) == [-1.0000000000000002, True]
        assert later.get("loglikelihood", ("a", " c")) is None
        assert later.get("generate_until", ("a", " b")) is None


def test_processes_beside_each_other_write_files_of_their_own(tmp_path: Path) -> None:
    with ResponseCache(tmp_path) as first, ResponseCache(tmp_path) as second:
        first.add("loglikelihood_rolling", ("a",), -1.5)
        second.add("loglikelihood_rolling", ("b",), -2.5)
    assert len(list(tmp_path.iterdir())) == 2
    with ResponseCache(tmp_path) as later:
        assert [later.get("loglikelihood_rolling", (text,)) for text in "ab"] == [-1.5, -2.5]


def test_an_answer_is_on_the_disk_as_soon_as_it_is_given(tmp_path: Path) -> None:
    with ResponseCache(tmp_path) as here:
        here.add("loglikelihood_rolling", ("a",), -1.5)
        assert ResponseCache(tmp_path).get("loglikelihood_rolling", ("a",)) == -1.5


def test_a_line_that_was_cut_short_is_passed_over(tmp_path: Path) -> None:
    with ResponseCache(tmp_path) as here:
        for text in "ab":
            here.add("loglikelihood_rolling", (text,), -1.5)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    with ResponseCache(tmp_path) as later:
        answers = [later.get("loglikelihood_rolling", (text,)) for text in "ab"]
    assert answers == [-1.5, None]


def test_without_a_folder_nothing_is_kept(tmp_path: Path) -> None:
    responses = ResponseCache()
    responses.add("loglikelihood_rolling", ("a",), -1.5)
    assert responses.get("loglikelihood_rolling", ("a",)) is None
