"""The published order of samples: against the published arrays, and against a plain loop."""

import json
from collections.abc import Callable
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tokengrow.data import megatron_order
from tokengrow.data.loader import train_loader
from tokengrow.data.megatron import HEADER, IndexedTokens, write_indexed
from tokengrow.data.megatron_order import (
    OrderKey,
    SampleOrder,
    build_order,
    num_epochs,
    num_samples,
    prepare_order,
    split_documents,
)
from tokengrow.data.megatron_source import MegatronConfig, MegatronSamples, MegatronSource
from tokengrow.data.store import TokenStore
from tokengrow.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "H_mmap_seed1234"
FIGURES = json.loads((GOLDEN / "samples.json").read_text())
RUNS = {run["name"]: run for run in FIGURES["runs"]}
SEED, T = FIGURES["seed"], FIGURES["seq_length"]


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """The index arrays that the published code computed."""
    return load_file(GOLDEN / "index_arrays.safetensors")


def tokens_of(run: dict[str, Any], files: IndexedTokens) -> int:
    first = run["first_document"]
    return len(files.tokens(first, first + run["n_documents"]))


def order_of(run: dict[str, Any], files: IndexedTokens, cache: Path) -> SampleOrder:
    epochs = num_epochs(tokens_of(run, files), T, run["num_samples"])
    first = run["first_document"]
    stop = first + run["n_documents"]
    return prepare_order(files.sizes, OrderKey("golden", first, stop, epochs, T, SEED), cache)


@pytest.mark.parametrize("kind", ["uint16", "int32"])
@pytest.mark.parametrize("name", RUNS)
class TestPublishedFigures:
    def test_epochs(self, name: str, kind: str) -> None:
        files, run = IndexedTokens.open(GOLDEN / f"data_{kind}"), RUNS[name]
        assert num_epochs(tokens_of(run, files), T, run["num_samples"]) == run["num_epochs"]

    @pytest.mark.parametrize("chunk", [2**22, 17])
    def test_the_three_arrays(
        self,
        name: str,
        kind: str,
        chunk: int,
        arrays: dict[str, np.ndarray],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(megatron_order, "_CHUNK", chunk)
        order = order_of(RUNS[name], IndexedTokens.open(GOLDEN / f"data_{kind}"), tmp_path)
        for array in ("doc_idx", "sample_idx", "shuffle_idx"):
            found = getattr(order, array)
            assert found.dtype == RUNS[name]["dtypes"][array]
            assert np.array_equal(found, arrays[f"{name}.{array}"]), array

    def test_every_sample(self, name: str, kind: str, tmp_path: Path) -> None:
        files, run = IndexedTokens.open(GOLDEN / f"data_{kind}"), RUNS[name]
        samples = MegatronSamples(files, order_of(run, files, tmp_path), T, vocab_size=50277)
        # The published dataset leaves the last of its samples out; here it comes last.
        assert len(samples) == run["shuffle_idx_len"] == run["len_dataset"] + 1
        for number, sample in enumerate(run["samples"]):
            assert samples[number].tolist() == sample
        digest = sha256()
        for number in range(run["len_dataset"]):
            digest.update(samples[number].numpy().astype("<i8").tobytes())
        assert digest.hexdigest() == run["sha256_all_samples"]


def test_the_published_split() -> None:
    assert split_documents("969, 30, 1", 240) == FIGURES["split_969_30_1"] == [0, 233, 240, 240]


@pytest.mark.parametrize(
    ("split", "documents", "bounds"),
    [
        ("1", 10, [0, 10, 10, 10]),
        ("80/20", 10, [0, 8, 10, 10]),
        ("1,1,2", 8, [0, 2, 4, 8]),
        # thirds of 5: 1.67 rounds to 2 thrice, one too many, which every boundary gives back
        ("1,1,1", 5, [0, 1, 3, 5]),
    ],
)
def test_a_split_worked_by_hand(split: str, documents: int, bounds: list[int]) -> None:
    assert split_documents(split, documents) == bounds


@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (2, 4), (4, 2)])
def test_every_rank_gets_the_published_batches(ranks: int, micro: int, tmp_path: Path) -> None:
    run, files = RUNS["all_docs_196"], IndexedTokens.open(GOLDEN / "data_uint16")
    samples = MegatronSamples(files, order_of(run, files, tmp_path), T, vocab_size=50277)
    published = FIGURES["batch_sampler_first_4_batches_by_rank"][f"world{ranks}_micro{micro}"]
    for rank in range(ranks):
        loader = train_loader(
            samples, seed=0, batch_size=micro * ranks, micro_batch_size=micro, rank=rank,
            world_size=ranks,
        )  # fmt: skip
        for batch, indices in zip(islice(loader, 4), published[rank], strict=True):
            assert torch.equal(batch, torch.stack([samples[index] for index in indices]))


def plain_starts(sizes: list[int], doc_idx: list[int], length: int, count: int) -> list[list[int]]:
    """Where samples begin, found by walking from document to document."""
    starts, place, offset = [[0, 0]], 0, 0
    for _ in range(count):
        remaining = length
        while remaining >= sizes[doc_idx[place]] - offset:
            remaining -= sizes[doc_idx[place]] - offset
            place, offset = place + 1, 0
        offset += remaining
        starts.append([place, offset])
    return starts


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    length=st.integers(1, 12),
    epochs=st.integers(1, 4),
    chunk=st.integers(1, 9),
)
def test_chunks_find_what_a_walk_finds(
    sizes: list[int], length: int, epochs: int, chunk: int, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("order")
    key = OrderKey("", 0, len(sizes), epochs, length, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_order, "_CHUNK", chunk)
        build_order(np.array(sizes, dtype=np.int32), key, folder)
    order = SampleOrder.open(folder)
    count = num_samples(sum(sizes), epochs, length)
    assert sorted(order.doc_idx.tolist()) == sorted([*range(len(sizes))] * epochs)
    assert sorted(order.shuffle_idx.tolist()) == list(range(count))
    assert order.sample_idx.tolist() == plain_starts(sizes, order.doc_idx.tolist(), length, count)


@given(tokens=st.integers(1, 10**6), length=st.integers(1, 5000), samples=st.integers(0, 10**7))
def test_epochs_are_as_many_as_needed_and_no_more(tokens: int, length: int, samples: int) -> None:
    epochs = num_epochs(tokens, length, samples)
    assert num_samples(tokens, epochs, length) >= samples
    assert epochs == 1 or num_samples(tokens, epochs - 1, length) < samples


def test_samples_lie_anywhere_in_a_file_of_more_than_two_to_the_31_tokens(tmp_path: Path) -> None:
    sizes = np.full(4, 800_000_000, dtype="<i4")  # 3.2 billion tokens, of which the disk holds few
    with (tmp_path / "x.bin").open("wb") as data:
        data.truncate(2 * int(sizes.sum(dtype=np.int64)))
        data.seek(-2, 2)
        data.write(np.array([7], dtype="<u2").tobytes())
    pointers = 2 * (np.cumsum(sizes, dtype="<i8") - sizes)
    head = HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, 4, 5)
    index = head + sizes.tobytes() + pointers.tobytes() + np.arange(5, dtype="<i8").tobytes()
    (tmp_path / "x.idx").write_bytes(index)
    files = IndexedTokens.open(tmp_path / "x")
    order = prepare_order(files.sizes, OrderKey("", 0, 4, 1, 2**20, seed=0), tmp_path)
    samples = MegatronSamples(files, order, 2**20, vocab_size=8)
    row = np.cumsum([0, *(800_000_000 for _ in order.doc_idx)])
    holder = int(row[list(order.doc_idx).index(3) + 1] - 1) // 2**20  # of the last token's sample
    found = samples[order.shuffle_idx.tolist().index(holder)]
    assert found.max() == 7
    assert sum(int(samples[index].max() == 7) for index in range(0, len(samples), 300)) <= 2


def test_an_order_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, key = np.array([5, 9], dtype=np.int32), OrderKey("x", 0, 2, 1, 4, 0)
    first = prepare_order(sizes, key, tmp_path)
    monkeypatch.setattr(megatron_order, "build_order", None)
    again = prepare_order(sizes, key, tmp_path)
    assert again.folder == first.folder
    assert np.array_equal(again.sample_idx, first.sample_idx)


def test_an_order_of_other_files_has_a_place_of_its_own(tmp_path: Path) -> None:
    sizes = np.array([5, 9], dtype=np.int32)
    keys = [OrderKey(content, 0, 2, 1, 4, seed) for content in "xy" for seed in (0, 1)]
    assert len({prepare_order(sizes, key, tmp_path).folder for key in keys}) == 4


@pytest.fixture
def source(store: TokenStore, tmp_path: Path) -> Callable[..., MegatronSource]:
    """`source(**changes)`: the golden files, with a tokenizer that has all of their ids."""
    tokenizer = store.tokenizer()
    tokenizer.vocab_size = 50277

    def opened(samples: int = 412, **changes: Any) -> MegatronSource:
        config = MegatronConfig(**{"prefix": str(GOLDEN / "data_uint16"), **changes})
        return MegatronSource.open(
            config, tokenizer, samples=samples, context_length=T, seed=SEED, cache=tmp_path
        )

    return opened


class TestSource:
    def test_training_follows_the_published_order_of_the_train_split(
        self, source: Callable[..., MegatronSource]
    ) -> None:
        sequences = source().sequences("train", T)
        for number, sample in enumerate(RUNS["split_train"]["samples"]):
            assert sequences[number].tolist() == sample

    def test_validation_takes_the_held_out_documents_as_they_lie(
        self, source: Callable[..., MegatronSource]
    ) -> None:
        sequences = source().sequences("validation", T)
        listed = json.loads((GOLDEN / "documents.json").read_text())["documents"]
        stream = [token for document in listed[233:240] for token in document]
        assert len(sequences) == (len(stream) - 1) // T
        assert sequences[1].tolist() == stream[T : 2 * T + 1]

    def test_with_files_of_its_own_for_validation_nothing_is_held_out(
        self, source: Callable[..., MegatronSource]
    ) -> None:
        apart = source(validation_prefix=str(GOLDEN / "data_int32"), epochs=1)
        assert len(apart.sequences("train", T)) == (27739 - 1) // T
        assert len(apart.sequences("validation", T)) == (27739 - 1) // T

    def test_behind_the_last_sample_the_order_begins_again(
        self, source: Callable[..., MegatronSource]
    ) -> None:
        sequences = source(epochs=1).sequences("train", T)
        count = len(sequences)
        batch = sequences.batch(count // 8, 8, SEED)
        assert batch.tolist() == [
            number % count for number in range(count // 8 * 8, count // 8 * 8 + 8)
        ]

    def test_the_fingerprint_tells_orders_and_splits_apart(
        self, source: Callable[..., MegatronSource]
    ) -> None:
        assert source().fingerprint == source(samples=400).fingerprint  # two epochs as well
        others = [source(epochs=3), source(split="9,1"), source(samples=10_000)]
        assert len({each.fingerprint for each in [source(), *others]}) == 4

    def test_an_id_that_the_tokenizer_does_not_have_is_named(
        self, store: TokenStore, tmp_path: Path
    ) -> None:
        ids = np.arange(600)
        write_indexed(tmp_path / "x", [(ids, np.array([500, 100]))], vocab_size=600)
        opened = MegatronSource.open(
            MegatronConfig(prefix=str(tmp_path / "x"), split="1"), store.tokenizer(), samples=1,
            context_length=599, seed=0, cache=tmp_path,
        )  # fmt: skip
        with pytest.raises(
            UserError, match=r"x\.bin byte 1024: token id 512 lies outside.* of 512"
        ):
            opened.sequences("train", 599)[0]

    def test_so_is_one_in_the_validation_split(self, store: TokenStore, tmp_path: Path) -> None:
        ids = np.arange(600)
        write_indexed(tmp_path / "x", [(ids, np.array([300, 300]))], vocab_size=600)
        opened = MegatronSource.open(
            MegatronConfig(prefix=str(tmp_path / "x"), split="1,1"), store.tokenizer(), samples=1,
            context_length=299, seed=0, cache=tmp_path,
        )  # fmt: skip
        assert opened.sequences("train", 299)[0].max() < 300
        with pytest.raises(UserError, match=r"x\.bin byte 1024: token id 512 lies outside"):
            opened.sequences("validation", 299)[0]

    def test_a_validation_split_without_documents_names_the_way_out(
        self, source: Callable[..., MegatronSource]
    ) -> None:
        with pytest.raises(UserError, match=r"validation split has 0 tokens.*data\.split"):
            source(split="1").sequences("validation", T)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"split": "a,b"}, r"data\.split 'a,b'"),
        ({"split": "0,0"}, r"data\.split '0,0'.*at least 0"),
        ({"split": "-1,2"}, r"data\.split"),
        ({"epochs": 0}, r"data\.epochs is 0"),
    ],
)
def test_a_refused_setting_is_named(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        MegatronConfig(prefix="x", **setting)
