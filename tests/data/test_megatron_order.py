"""Tests of the published order of samples: published arrays, and a simple loop."""

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
from tokengrow.data.megatron import HEADER, IndexedTokens, write_indexed_tokens
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
    """Index arrays that the published code computed."""
    return load_file(GOLDEN / "index_arrays.safetensors")


def num_tokens(run: dict[str, Any], files: IndexedTokens) -> int:
    """Return the number of tokens of the documents of a run."""
    first = run["first_document"]
    return len(files.tokens(first, first + run["n_documents"]))


def run_order(run: dict[str, Any], files: IndexedTokens, cache: Path) -> SampleOrder:
    """Return the order of the samples of a run."""
    epochs = num_epochs(num_tokens(run, files), T, run["num_samples"])
    first = run["first_document"]
    stop = first + run["n_documents"]
    return prepare_order(files.sizes, OrderKey("golden", first, stop, epochs, T, SEED), cache)


@pytest.mark.parametrize("kind", ["uint16", "int32"])
@pytest.mark.parametrize("name", RUNS)
class TestPublishedFigures:
    """Epochs, arrays and samples that the published code computed."""

    def test_epochs(self, name: str, kind: str) -> None:
        files, run = IndexedTokens.open(GOLDEN / f"data_{kind}"), RUNS[name]
        assert num_epochs(num_tokens(run, files), T, run["num_samples"]) == run["num_epochs"]

    @pytest.mark.parametrize("chunk", [2**22, 17])
    def test_arrays(
        self,
        name: str,
        kind: str,
        chunk: int,
        arrays: dict[str, np.ndarray],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(megatron_order, "_CHUNK_SIZE", chunk)
        order = run_order(RUNS[name], IndexedTokens.open(GOLDEN / f"data_{kind}"), tmp_path)
        for array in ("doc_idx", "sample_idx", "shuffle_idx"):
            values = getattr(order, array)
            assert values.dtype == RUNS[name]["dtypes"][array]
            assert np.array_equal(values, arrays[f"{name}.{array}"]), array

    def test_samples(self, name: str, kind: str, tmp_path: Path) -> None:
        files, run = IndexedTokens.open(GOLDEN / f"data_{kind}"), RUNS[name]
        samples = MegatronSamples(files, run_order(run, files, tmp_path), T, vocab_size=50277)
        # The published dataset omits its last sample; here it is the last one.
        assert len(samples) == run["shuffle_idx_len"] == run["len_dataset"] + 1
        for number, sample in enumerate(run["samples"]):
            assert samples[number].tolist() == sample
        digest = sha256()
        for number in range(run["len_dataset"]):
            digest.update(samples[number].numpy().astype("<i8").tobytes())
        assert digest.hexdigest() == run["sha256_all_samples"]


def test_published_split() -> None:
    assert split_documents("969, 30, 1", 240) == FIGURES["split_969_30_1"] == [0, 233, 240, 240]


@pytest.mark.parametrize(
    ("split", "documents", "bounds"),
    [
        ("1", 10, [0, 10, 10, 10]),
        ("80/20", 10, [0, 8, 10, 10]),
        ("1,1,2", 8, [0, 2, 4, 8]),
        # Each third of 5, 1.67, rounds to 2. The excess of 1 is subtracted from every bound.
        ("1,1,1", 5, [0, 1, 3, 5]),
    ],
)
def test_split_computed_by_hand(split: str, documents: int, bounds: list[int]) -> None:
    assert split_documents(split, documents) == bounds


@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (2, 4), (4, 2)])
def test_every_rank_gets_published_batches(ranks: int, micro: int, tmp_path: Path) -> None:
    run, files = RUNS["all_docs_196"], IndexedTokens.open(GOLDEN / "data_uint16")
    samples = MegatronSamples(files, run_order(run, files, tmp_path), T, vocab_size=50277)
    published = FIGURES["batch_sampler_first_4_batches_by_rank"][f"world{ranks}_micro{micro}"]
    for rank in range(ranks):
        loader = train_loader(
            samples, seed=0, batch_size=micro * ranks, micro_batch_size=micro, rank=rank,
            world_size=ranks,
        )  # fmt: skip
        for batch, indices in zip(islice(loader, 4), published[rank], strict=True):
            assert torch.equal(batch, torch.stack([samples[index] for index in indices]))


def loop_starts(sizes: list[int], doc_idx: list[int], length: int, count: int) -> list[list[int]]:
    """Return the starts of samples, computed by a loop over the documents."""
    starts, position, offset = [[0, 0]], 0, 0
    for _ in range(count):
        remaining = length
        while remaining >= sizes[doc_idx[position]] - offset:
            remaining -= sizes[doc_idx[position]] - offset
            position, offset = position + 1, 0
        offset += remaining
        starts.append([position, offset])
    return starts


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    length=st.integers(1, 12),
    epochs=st.integers(1, 4),
    chunk=st.integers(1, 9),
)
def test_chunked_starts_equal_loop(
    sizes: list[int], length: int, epochs: int, chunk: int, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("order")
    key = OrderKey("", 0, len(sizes), epochs, length, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_order, "_CHUNK_SIZE", chunk)
        build_order(np.array(sizes, dtype=np.int32), key, folder)
    order = SampleOrder.open(folder)
    count = num_samples(sum(sizes), epochs, length)
    assert sorted(order.doc_idx.tolist()) == sorted([*range(len(sizes))] * epochs)
    assert sorted(order.shuffle_idx.tolist()) == list(range(count))
    assert order.sample_idx.tolist() == loop_starts(sizes, order.doc_idx.tolist(), length, count)


@given(tokens=st.integers(1, 10**6), length=st.integers(1, 5000), samples=st.integers(0, 10**7))
def test_num_epochs_is_minimal(tokens: int, length: int, samples: int) -> None:
    epochs = num_epochs(tokens, length, samples)
    assert num_samples(tokens, epochs, length) >= samples
    assert epochs == 1 or num_samples(tokens, epochs - 1, length) < samples


def test_samples_of_file_with_more_than_2_to_31_tokens(tmp_path: Path) -> None:
    sizes = np.full(4, 800_000_000, dtype="<i4")  # 3.2 billion tokens in a sparse file
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
    last_sample = int(row[list(order.doc_idx).index(3) + 1] - 1) // 2**20  # of the last token
    sample = samples[order.shuffle_idx.tolist().index(last_sample)]
    assert sample.max() == 7
    assert sum(int(samples[index].max() == 7) for index in range(0, len(samples), 300)) <= 2


def test_order_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, key = np.array([5, 9], dtype=np.int32), OrderKey("x", 0, 2, 1, 4, 0)
    first = prepare_order(sizes, key, tmp_path)
    monkeypatch.setattr(megatron_order, "build_order", None)
    again = prepare_order(sizes, key, tmp_path)
    assert again.folder == first.folder
    assert np.array_equal(again.sample_idx, first.sample_idx)


def test_order_of_other_files_or_seed_is_cached_separately(tmp_path: Path) -> None:
    sizes = np.array([5, 9], dtype=np.int32)
    keys = [OrderKey(content, 0, 2, 1, 4, seed) for content in "xy" for seed in (0, 1)]
    assert len({prepare_order(sizes, key, tmp_path).folder for key in keys}) == 4


@pytest.fixture
def source(store: TokenStore, tmp_path: Path) -> Callable[..., MegatronSource]:
    """`source(**changes)`: source of the golden files and a tokenizer that has all their ids."""
    tokenizer = store.tokenizer()
    tokenizer.vocab_size = 50277

    def open_source(samples: int = 412, **changes: Any) -> MegatronSource:
        config = MegatronConfig(**{"prefix": str(GOLDEN / "data_uint16"), **changes})
        return MegatronSource.open(
            config, tokenizer, samples=samples, context_length=T, seed=SEED, cache=tmp_path
        )

    return open_source


class TestSource:
    """Splits, order and errors of a `MegatronSource`."""

    def test_training_follows_published_order(self, source: Callable[..., MegatronSource]) -> None:
        sequences = source().sequences("train", T)
        for number, sample in enumerate(RUNS["split_train"]["samples"]):
            assert sequences[number].tolist() == sample

    def test_validation_reads_held_out_documents_in_file_order(
        self, source: Callable[..., MegatronSource]
    ) -> None:
        sequences = source().sequences("validation", T)
        listed = json.loads((GOLDEN / "documents.json").read_text())["documents"]
        stream = [token for document in listed[233:240] for token in document]
        assert len(sequences) == (len(stream) - 1) // T
        assert sequences[1].tolist() == stream[T : 2 * T + 1]

    def test_validation_prefix_holds_out_no_documents(
        self, source: Callable[..., MegatronSource]
    ) -> None:
        separate = source(validation_prefix=str(GOLDEN / "data_int32"), epochs=1)
        assert len(separate.sequences("train", T)) == (27739 - 1) // T
        assert len(separate.sequences("validation", T)) == (27739 - 1) // T

    def test_order_repeats_after_last_sample(self, source: Callable[..., MegatronSource]) -> None:
        sequences = source(epochs=1).sequences("train", T)
        count = len(sequences)
        batch = sequences.batch_indices(count // 8, 8, SEED)
        assert batch.tolist() == [
            number % count for number in range(count // 8 * 8, count // 8 * 8 + 8)
        ]

    def test_fingerprint_differs_between_orders_and_splits(
        self, source: Callable[..., MegatronSource]
    ) -> None:
        assert source().fingerprint == source(samples=400).fingerprint  # two epochs, too
        others = [source(epochs=3), source(split="9,1"), source(samples=10_000)]
        assert len({each.fingerprint for each in [source(), *others]}) == 4

    def test_id_outside_vocabulary_is_named(self, store: TokenStore, tmp_path: Path) -> None:
        ids = np.arange(600)
        write_indexed_tokens(tmp_path / "x", [(ids, np.array([500, 100]))], vocab_size=600)
        source = MegatronSource.open(
            MegatronConfig(prefix=str(tmp_path / "x"), split="1"), store.tokenizer(), samples=1,
            context_length=599, seed=0, cache=tmp_path,
        )  # fmt: skip
        with pytest.raises(UserError, match=r"x\.bin byte 1024: token id 512 is outside.* of 512"):
            source.sequences("train", 599)[0]

    def test_validation_id_outside_vocabulary_is_named(
        self, store: TokenStore, tmp_path: Path
    ) -> None:
        ids = np.arange(600)
        write_indexed_tokens(tmp_path / "x", [(ids, np.array([300, 300]))], vocab_size=600)
        source = MegatronSource.open(
            MegatronConfig(prefix=str(tmp_path / "x"), split="1,1"), store.tokenizer(), samples=1,
            context_length=299, seed=0, cache=tmp_path,
        )  # fmt: skip
        assert source.sequences("train", 299)[0].max() < 300
        with pytest.raises(UserError, match=r"x\.bin byte 1024: token id 512 is outside"):
            source.sequences("validation", 299)[0]

    def test_empty_validation_split_names_remedy(
        self, source: Callable[..., MegatronSource]
    ) -> None:
        with pytest.raises(UserError, match=r"in its validation split, got 0 tokens.*data\.split"):
            source(split="1").sequences("validation", T)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"split": "a,b"}, r"data\.split must be .*, got 'a,b'"),
        ({"split": "0,0"}, r"data\.split must be .*, got '0,0'.*at least 0"),
        ({"split": "-1,2"}, r"data\.split must be .*, got '-1,2'"),
        ({"epochs": 0}, r"data\.epochs must be at least 1 or null, got 0"),
    ],
)
def test_invalid_setting_is_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MegatronConfig(prefix="x", **setting)
