"""Tests of mixtures: exact shares, every sequence once per epoch of its source, one tokenizer."""

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokengrow.data import order
from tokengrow.data.corpus import Corpus, TextCorpus
from tokengrow.data.loader import evenly_spaced_batch, train_loader, validation_loader
from tokengrow.data.mixture import (
    MixedSequences,
    MixedSource,
    Mixture,
    MixtureConfig,
    MixtureText,
    build_mixture,
    open_store,
    prepare_mixture,
)
from tokengrow.data.order import apportion, mixed_batch_indices
from tokengrow.data.sequences import Sequences, TokenArray
from tokengrow.data.store import TokenStore
from tokengrow.data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from tokengrow.errors import UserError

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterable[None]:
    """Blocks of 64 positions, so that a few batches span several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "BLOCK_SIZE", 64)
        patch.setattr("tokengrow.data.mixture.BLOCK_SIZE", 64)
        order._shuffled_block.cache_clear()
        yield
    order._shuffled_block.cache_clear()


class TestOrder:
    """`mixed_batch_indices`: which source, and which of its sequences."""

    @given(total=st.integers(0, 10**6), weights=WEIGHTS)
    def test_apportioned_shares_differ_by_less_than_one(
        self, total: int, weights: list[float]
    ) -> None:
        counts = apportion(total, weights)
        assert sum(counts) == total
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - total * weight / sum(weights)) < 1 + 1e-6

    @given(seed=st.integers(0, 2**64), weights=WEIGHTS, block=st.integers(0, 1000))
    def test_every_block_has_exact_shares(
        self, seed: int, weights: list[float], block: int
    ) -> None:
        quotas = apportion(64, weights)
        sources, _ = mixed_batch_indices(seed, block, 64, quotas, [7] * len(quotas))
        assert np.array_equal(np.bincount(sources, minlength=len(quotas)), quotas)

    @given(seed=st.integers(0, 2**64), data=st.data())
    @settings(deadline=None, max_examples=40)
    def test_source_epoch_visits_every_sequence_once(self, seed: int, data: st.DataObject) -> None:
        """Check the visits in their order; epochs need not be aligned to blocks."""
        lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
        weights = data.draw(
            st.lists(st.integers(1, 9), min_size=len(lengths), max_size=len(lengths))
        )
        sources, indices = mixed_batch_indices(seed, 0, 640, apportion(64, weights), lengths)
        for source, length in enumerate(lengths):
            visits = indices[sources == source]
            for start in range(0, len(visits), length):
                epoch = visits[start : start + length]
                assert len(set(epoch)) == len(epoch), "no sequence is repeated in an epoch"
                assert epoch.min() >= 0 and epoch.max() < length

    @given(
        seed=st.integers(0, 2**64),
        batch_size=st.integers(1, 200),
        number=st.integers(0, 50),
        weights=WEIGHTS,
    )
    @settings(deadline=None, max_examples=30)
    def test_batch_equals_batches_of_single_positions(
        self, seed: int, batch_size: int, number: int, weights: list[float]
    ) -> None:
        """Check that batches of any size divide one stream, and that any of them can be first."""
        quotas, lengths = apportion(64, weights), [5 + 3 * i for i in range(len(weights))]
        together = np.stack(mixed_batch_indices(seed, number, batch_size, quotas, lengths))
        positions = range(number * batch_size, (number + 1) * batch_size)
        single = [np.stack(mixed_batch_indices(seed, p, 1, quotas, lengths)) for p in positions]
        assert np.array_equal(together, np.concatenate(single, axis=1))

    def test_blocks_seeds_and_sources_have_different_orders(self) -> None:
        quotas, lengths = (32, 32), [1000, 1000]
        blocks = [
            mixed_batch_indices(seed, b, 64, quotas, lengths) for seed in (0, 1) for b in (0, 1)
        ]
        assert len({sources.tobytes() for sources, _ in blocks}) == 4
        sources, indices = mixed_batch_indices(0, 0, 64, quotas, lengths)
        assert not np.array_equal(indices[sources == 0], indices[sources == 1])


@pytest.fixture
def parts(tmp_path: Path) -> list[Sequences]:
    """Two sources: 10 and 4 sequences of 3 tokens; ids of the second start at 1000."""
    parts = []
    for name, tokens in (("a", np.arange(31)), ("b", np.arange(1000, 1013))):
        tokens.astype("<u2").tofile(tmp_path / f"{name}.bin")
        parts.append(Sequences(TokenArray([tmp_path / f"{name}.bin"], [len(tokens)], "<u2"), 3))
    return parts


def first_batches(loader: Iterable[torch.Tensor], count: int) -> torch.Tensor:
    """Return the first batches of a loader, concatenated."""
    return torch.cat(list(islice(loader, count)))


class TestSequences:
    """Batches of a mixture."""

    def test_sequences_of_sources_are_concatenated(self, parts: list[Sequences]) -> None:
        mixed = MixedSequences(parts, (48, 16))
        assert len(mixed) == 14
        assert mixed[9].tolist() == [27, 28, 29, 30]
        assert mixed[10].tolist() == [1000, 1001, 1002, 1003]
        for outside in (-1, 14):
            with pytest.raises(IndexError, match=f"sequence {outside} of 14"):
                mixed[outside]

    @pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
    @pytest.mark.parametrize("world_size", [1, 2])
    def test_batches_are_independent_of_their_division(
        self, parts: list[Sequences], micro_batch_size: int, world_size: int
    ) -> None:
        mixed = MixedSequences(parts, (48, 16))
        sizes = {"seed": 5, "batch_size": 8}
        batches = first_batches(train_loader(mixed, **sizes, micro_batch_size=8), 20)
        division = {
            "micro_batch_size": micro_batch_size,
            "world_size": world_size,
            "start_batch": 7,
        }
        per_batch = 8 // micro_batch_size // world_size
        ranks = [
            first_batches(train_loader(mixed, **sizes, **division, rank=rank), 13 * per_batch)
            for rank in range(world_size)
        ]
        shape = (13, per_batch, micro_batch_size, 4)
        resumed = torch.stack([rank.view(shape) for rank in ranks], 2).view(-1, 4)
        assert torch.equal(resumed, batches[7 * 8 :])

    def test_workers_do_not_change_batches(self, parts: list[Sequences]) -> None:
        mixed = MixedSequences(parts, (48, 16))
        expected, prefetched = (
            first_batches(
                train_loader(mixed, seed=1, batch_size=4, micro_batch_size=4, workers=n), 20
            )
            for n in (0, 2)
        )
        assert torch.equal(expected, prefetched)

    def test_validation_has_same_shares_evenly_spaced(self, parts: list[Sequences]) -> None:
        mixed = MixedSequences(parts, (48, 16))
        batches = list(validation_loader(mixed, batch_size=4, max_sequences=8))
        starts = torch.cat(batches)[:, 0]
        assert starts.tolist() == [0, 3, 9, 15, 18, 24, 1000, 1006]  # six of ten, two of four
        assert evenly_spaced_batch(mixed, 4)[:, 0].tolist() == [0, 9, 18, 1000]

    def test_short_source_repeats_in_validation(self, parts: list[Sequences]) -> None:
        mixed = MixedSequences(parts, (16, 48))
        (batch,) = validation_loader(mixed, batch_size=12, max_sequences=12)
        repeated = [1000 + 3 * i for i in (0, 0, 0, 1, 1, 2, 2, 3, 3)]
        assert batch[:, 0].tolist() == [0, 9, 18, *repeated]


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, Corpus]:
    """Two files: 60 documents of words, 40 of numbers."""
    texts = {
        "words": [f"so it goes, {n} " + "and on " * (n % 5) for n in range(60)],
        "numbers": [f"{n} {n * n} " * 8 for n in range(40)],
    }
    corpora: dict[str, Corpus] = {}
    for name, documents in texts.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        corpora[name] = TextCorpus(files=[str(file)], validation_fraction=0.2)
    return corpora


@pytest.fixture
def tokenizer(corpora: dict[str, Corpus]) -> Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=300), MixtureText(corpora))


def mixture_config(
    corpora: dict[str, Corpus], words: float = 3, numbers: float = 1
) -> MixtureConfig:
    """Return the config of a mixture of `words` and `numbers` with these weights."""
    weights = {"words": words, "numbers": numbers}
    sources = {
        name: MixedSource(weight=weights[name], corpus=corpus) for name, corpus in corpora.items()
    }
    return MixtureConfig(sources=sources)


class TestStores:
    """One store per source, built once."""

    def test_new_weights_tokenise_nothing_again(
        self, corpora: dict[str, Corpus], tokenizer: Tokenizer, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        before = prepare_mixture(mixture_config(corpora), tokenizer, tmp_path, progress=False)
        assert before.quotas == (16, 48)  # numbers, words: sorted by name
        monkeypatch.setattr(TextCorpus, "documents", None)  # reading again would raise
        after = prepare_mixture(mixture_config(corpora, 1, 1), tokenizer, tmp_path, progress=False)
        assert after.quotas == (32, 32) and after.stores == before.stores

    def test_fingerprint_covers_names_shares_and_content(
        self, corpora: dict[str, Corpus], tokenizer: Tokenizer, tmp_path: Path
    ) -> None:
        def fingerprint(mixture: MixtureConfig) -> str:
            return prepare_mixture(mixture, tokenizer, tmp_path, progress=False).fingerprint

        first = fingerprint(mixture_config(corpora))
        assert fingerprint(mixture_config(corpora, 6, 2)) == first, (
            "doubled weights give the same shares"
        )
        assert fingerprint(mixture_config(dict(reversed(corpora.items())))) == first, (
            "the order of sources has no effect"
        )
        renamed = {"text": corpora["words"], "numbers": corpora["numbers"]}
        sources = {name: MixedSource(corpus=corpus) for name, corpus in renamed.items()}
        others = {
            fingerprint(mixture_config(corpora, 1, 1)),
            fingerprint(MixtureConfig(sources=sources)),
        }
        assert len(others | {first}) == 3

    def test_sequences_equal_those_of_stores(
        self, corpora: dict[str, Corpus], tokenizer: Tokenizer, tmp_path: Path
    ) -> None:
        mixture = prepare_mixture(mixture_config(corpora), tokenizer, tmp_path, progress=False)
        assert mixture.vocab_size == 300
        assert mixture.tokenizer().fingerprint == tokenizer.fingerprint
        mixed = mixture.sequences("train", 16)
        stores = [mixture.stores[name].sequences("train", 16) for name in ("numbers", "words")]
        assert len(mixed) == sum(map(len, stores))
        assert torch.equal(mixed[len(stores[0])], stores[1][0])

    def test_tokenizer_text_has_equal_shares(self, corpora: dict[str, Corpus]) -> None:
        """Check the shares while neither source is exhausted; weights have no effect."""
        documents = list(islice(MixtureText(corpora).documents("train"), 40))
        words = sum(len(text) for text in documents if text.startswith("so"))
        total = sum(len(text) for text in documents)
        assert abs(words - total / 2) < 200
        assert len(list(MixtureText(corpora).documents("train"))) == sum(
            len(list(corpus.documents("train"))) for corpus in corpora.values()
        )

    def test_folder_of_stores_is_opened_as_mixture(
        self, corpora: dict[str, Corpus], tokenizer: Tokenizer, tmp_path: Path
    ) -> None:
        built = build_mixture(mixture_config(corpora), tokenizer, tmp_path / "out", progress=False)
        (tmp_path / "out").rename(tmp_path / "moved")
        opened = open_store(tmp_path / "moved")
        assert isinstance(opened, Mixture) and opened.fingerprint == built.fingerprint
        assert isinstance(open_store(tmp_path / "moved" / "words"), TokenStore)
        again = build_mixture(
            mixture_config(corpora), tokenizer, tmp_path / "moved", progress=False
        )
        assert again.fingerprint == built.fingerprint

    def test_existing_store_is_mixed_with_text(
        self, corpora: dict[str, Corpus], tokenizer: Tokenizer, tmp_path: Path
    ) -> None:
        built = build_mixture(mixture_config(corpora), tokenizer, tmp_path / "out", progress=False)
        stored = MixedSource(weight=3, store=str(tmp_path / "out" / "words"))
        sources = {"words": stored, "numbers": MixedSource(corpus=corpora["numbers"])}
        mixed = MixtureConfig(sources=sources)
        stored_tokenizer = mixed.stored_tokenizer()
        assert stored_tokenizer is not None
        assert stored_tokenizer.fingerprint == tokenizer.fingerprint
        assert prepare_mixture(mixed, stored_tokenizer, tmp_path, progress=False).fingerprint == (
            built.fingerprint
        )
        copied = build_mixture(mixed, stored_tokenizer, tmp_path / "second", progress=False)
        assert open_store(tmp_path / "second").fingerprint == copied.fingerprint

    def test_relative_paths_of_stores_are_resolved(
        self,
        corpora: dict[str, Corpus],
        tokenizer: Tokenizer,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        build_mixture(mixture_config(corpora), tokenizer, tmp_path / "out", progress=False)
        monkeypatch.chdir(tmp_path)
        mixed = MixtureConfig(sources={n: MixedSource(store=f"out/{n}") for n in corpora})
        copied = build_mixture(mixed, tokenizer, Path("second"), progress=False)
        monkeypatch.chdir("second")
        assert open_store(tmp_path / "second").fingerprint == copied.fingerprint

    def test_folder_of_other_weights_is_not_overwritten(
        self, corpora: dict[str, Corpus], tokenizer: Tokenizer, tmp_path: Path
    ) -> None:
        build_mixture(mixture_config(corpora), tokenizer, tmp_path / "out", progress=False)
        record = (tmp_path / "out" / "mixture.json").read_bytes()
        with pytest.raises(UserError, match=r"other sources or weights\. Choose another out=, and"):
            build_mixture(mixture_config(corpora, 1), tokenizer, tmp_path / "out", progress=False)
        assert (tmp_path / "out" / "mixture.json").read_bytes() == record


class TestInvalidInput:
    """Errors name the source."""

    def test_missing_file_is_found_before_writing(
        self, corpora: dict[str, Corpus], tokenizer: Tokenizer, tmp_path: Path
    ) -> None:
        sources = corpora | {"words": TextCorpus(files=["absent.txt"])}
        with pytest.raises(
            UserError, match=r"data.sources.words: data.files must .*, got 'absent.txt', which"
        ):
            build_mixture(mixture_config(sources), tokenizer, tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()

    def test_store_before_malformed_source_is_kept(
        self, corpora: dict[str, Corpus], tokenizer: Tokenizer, tmp_path: Path
    ) -> None:
        (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{broken\n')
        sources = corpora | {"words": TextCorpus(files=[str(tmp_path / "broken.jsonl")])}
        with pytest.raises(
            UserError, match=r"data.sources.words: data.files: .*, line 2: not JSON"
        ):
            build_mixture(mixture_config(sources), tokenizer, tmp_path / "out", progress=False)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["numbers"]

    def test_different_tokenizers_are_rejected(
        self, corpora: dict[str, Corpus], tmp_path: Path
    ) -> None:
        sources = {}
        for size, (name, corpus) in zip((280, 290), corpora.items(), strict=True):
            tokenizer = train_tokenizer(TokenizerConfig(vocab_size=size), corpus)
            mixture = MixtureConfig(sources={name: MixedSource(corpus=corpus)})
            build_mixture(mixture, tokenizer, tmp_path / name, progress=False)
            sources[name] = MixedSource(store=str(tmp_path / name / name))
        with pytest.raises(
            UserError, match=r"must have one tokenizer, but words .* and numbers .* have different"
        ):
            prepare_mixture(MixtureConfig(sources=sources), tokenizer, tmp_path, progress=False)

    def test_source_shorter_than_sequence_is_named(
        self, corpora: dict[str, Corpus], tokenizer: Tokenizer, tmp_path: Path
    ) -> None:
        mixture = prepare_mixture(mixture_config(corpora), tokenizer, tmp_path, progress=False)
        with pytest.raises(
            UserError, match=r"data.sources.numbers: data must have .* in its train split, got"
        ):
            mixture.sequences("train", 10**5)

    @pytest.mark.parametrize("content", [b"", b"{}", b'{"format": 1, "sources": {"a": 1}}'])
    def test_malformed_record_is_named(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "mixture.json").write_bytes(content)
        with pytest.raises(UserError, match=r"Damaged mixture: .*mixture.json was not written by"):
            open_store(tmp_path)

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ({}, r"data.sources must have at least one source, got none"),
            ({"a": 0.0}, r"data.sources.a.weight must be greater than 0, got 0\."),
            ({"a": float("nan")}, r"data.sources.a.weight must be greater than 0, got nan\."),
            (
                {"a": 1.0, "b": 1e-9},
                r"data.sources.b.weight must give at least half a sequence in .*, got 1e-09\.",
            ),
            ({"a/b": 1.0}, r"data.sources must have names of letters, .*, got 'a/b'"),
        ],
    )
    def test_invalid_weight_or_name_is_named(self, weights: dict[str, float], message: str) -> None:
        sources = {name: MixedSource(weight=weight, store="x") for name, weight in weights.items()}
        with pytest.raises(UserError, match=message):
            MixtureConfig(sources=sources)
