"""`tokengrow data`: a corpus into a token store, once."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.data.corpus import TextCorpus
from tokengrow.data.megatron_source import MegatronSource
from tokengrow.data.open_tokens import open_tokens
from tokengrow.data.store import TokenStore
from tokengrow.training.recipe import resolve_train, tokens_request

Command = Callable[..., Any]

SMALL = [
    "recipes=quickstart",
    "model.vocab_size=300",
    "model.width=32",
    "model.layers=1",
    "model.context_length=16",
    "max_steps_per_stage=1",
    "validation_sequences=4",
    "fabric=cpu",
]
"""One update a stage of a model that the store's vocabulary fits."""


@pytest.fixture
def arguments(corpus: TextCorpus, tmp_path: Path) -> list[str]:
    """The session's corpus into a store of a vocabulary of 300."""
    return [
        "data=text",
        f"data.files={corpus.files}",
        f"data.validation_files={corpus.validation_files}",
        "tokenizer.vocab_size=300",
        f"out={tmp_path / 'store'}",
    ]


def test_it_makes_a_store_and_says_what_is_in_it(
    command: Command, arguments: list[str], tmp_path: Path
) -> None:
    outcome = command("data", *arguments)
    assert outcome.status == 0
    store = TokenStore.open(tmp_path / "store")
    assert store.vocab_size == 300
    for count in (len(store.split("train")), len(store.split("validation")), 300):
        assert f"{count:,}" in outcome.out
    assert str(tmp_path / "store") in outcome.out


def test_a_second_call_reuses_the_store(
    command: Command, arguments: list[str], tmp_path: Path
) -> None:
    first = command("data", *arguments)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    second = command("data", *arguments)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()} == stamps
    assert second.out == first.out


def test_an_out_with_tokens_of_another_corpus_is_refused(
    command: Command, arguments: list[str], corpus: TextCorpus
) -> None:
    command("data", *arguments)
    outcome = command("data", *arguments, f"data.files=[{corpus.files[0]}/ast.txt]")
    assert outcome.status == 2
    assert "was made from another corpus" in outcome.err


def test_a_store_trains_a_model(command: Command, arguments: list[str], tmp_path: Path) -> None:
    command("data", *arguments)
    outcome = command(
        "train",
        *SMALL,
        f"store={tmp_path / 'store'}",
        f"out={tmp_path / 'run'}",
    )
    assert outcome.status == 0, outcome.err


@pytest.mark.fault(
    "a token shard is damaged",
    "while a run pauses",
    "refused with 2, file and byte named; checkpoints untouched",
)
def test_a_shard_damaged_while_a_run_pauses_is_named_and_the_run_is_left_as_it_was(
    command: Command, arguments: list[str], tmp_path: Path
) -> None:
    command("data", *arguments)
    run = ["train", *SMALL, f"store={tmp_path / 'store'}", f"out={tmp_path / 'run'}"]
    assert command(*run).status == 0
    whole = load_checkpoint(tmp_path / "run").train_state
    shard = tmp_path / "store" / "train_00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(b"\xff" * len(content))  # the size is right
    outcome = command(*run, "+stages.more.steps=1")
    assert outcome.status == 2
    assert re.search(
        r"^tokengrow train: \S+train_00000.bin byte \d+: token id 65535 is outside the "
        r"tokenizer's vocabulary of 300\. Restore the file",
        outcome.err,
        re.MULTILINE,
    )
    assert load_checkpoint(tmp_path / "run").train_state == whole

    shard.write_bytes(content)
    assert command(*run, "+stages.more.steps=1").status == 0
    assert load_checkpoint(tmp_path / "run").train_state.step == whole.step + 1


def test_training_keeps_its_store_in_the_cache(
    command: Command, arguments: list[str], cache: Path, tmp_path: Path
) -> None:
    for run in ("first", "second"):
        outcome = command(
            "train",
            *SMALL,
            *arguments[:-1],
            f"out={tmp_path / run}",
        )
        assert outcome.status == 0, outcome.err
        stores = {path.name: path.stat().st_mtime_ns for path in (cache / "stores").iterdir()}
        if run == "first":
            first = stores
    assert stores == first


class TestMegatron:
    """`to=megatron`, and training with `data=megatron`."""

    @pytest.fixture
    def files(self, command: Command, arguments: list[str], tmp_path: Path) -> Path:
        assert command("data", *arguments, "to=megatron").status == 0
        return tmp_path / "store"

    def given(self, files: Path) -> list[str]:
        return [
            "data=megatron",
            f"data.prefix={files / 'train_text_document'}",
            f"data.validation_prefix={files / 'validation_text_document'}",
            "tokenizer=file",
            f"tokenizer.file={files / 'tokenizer.json'}",
        ]

    def test_it_says_how_to_train_on_what_it_wrote(
        self, command: Command, arguments: list[str], tmp_path: Path
    ) -> None:
        outcome = command("data", *arguments, "to=megatron")
        last = outcome.out.splitlines()[-1]
        assert last == f"train with  {' '.join(self.given(tmp_path / 'store'))}"
        written = {path.name for path in (tmp_path / "store").iterdir()}
        pairs = {f"{name}_text_document" for name in ("train", "validation")}
        assert written == {f"{pair}{end}" for pair in pairs for end in (".bin", ".idx")} | {
            "tokenizer.json"
        }

    def test_what_is_there_is_not_overwritten(
        self, command: Command, arguments: list[str], files: Path
    ) -> None:
        again = command("data", *arguments, "to=megatron")
        assert again.status == 2
        message = f"out={files} exists. Choose another out=; nothing is overwritten.\n"
        assert again.err == f"tokengrow data: {message}"

    def test_a_run_trains_on_the_files_and_resumes(
        self, command: Command, files: Path, tmp_path: Path
    ) -> None:
        run = ["train", *SMALL, *self.given(files), f"out={tmp_path / 'run'}"]
        first = command(*run)
        assert first.status == 0, first.err
        shown = " ".join(first.out.split())
        assert "samples of 16 tokens, 1 epoch of the training documents of" in shown
        again = command(*run)
        assert "is finished" in " ".join(again.out.split())

    def test_as_many_epochs_are_shuffled_as_the_run_needs(
        self, composed: Callable[..., dict[str, Any]], files: Path
    ) -> None:
        sizes = ["model=tiny", "model.context_length=16", "batch_size=16"]
        needed = {}
        for steps in (1, 2000):
            stage = f"+stages.only.steps={steps}"
            values = composed("train", *sizes, *self.given(files), stage)
            source = open_tokens(tokens_request(resolve_train(values)), Console(quiet=True))
            assert isinstance(source, MegatronSource)
            assert len(source.sequences("train", 16)) >= 16 * steps
            needed[steps] = source.epochs
        assert needed[1] == 1 < needed[2000]

    def test_a_run_keeps_the_epochs_that_its_order_was_made_for(
        self, command: Command, files: Path, tmp_path: Path
    ) -> None:
        run = ["train", *SMALL, *self.given(files), f"out={tmp_path / 'run'}"]
        assert command(*run).status == 0
        longer = command(*run, "data.epochs=2")
        assert longer.status == 2
        assert (
            "whose samples were ordered for another number of epochs: data.epochs must be 1, got "
            "2. Set data.epochs=1; that order repeats after its last sample."
        ) in longer.err
        further = [*run, "+stages.more.steps=1", "data.epochs=1"]
        assert command(*further).status == 0

    def test_a_run_that_goes_on_takes_the_next_samples_of_the_same_order(
        self, command: Command, files: Path, tmp_path: Path
    ) -> None:
        run = ["train", *SMALL, *self.given(files), "data.epochs=3", f"out={tmp_path / 'run'}"]
        assert command(*run).status == 0
        seen = load_checkpoint(tmp_path / "run", tensors=False)
        more = ["recipes=continue", f"source={tmp_path / 'run'}", f"out={tmp_path / 'more'}"]
        assert command("train", *more, "stages.continued.steps=2", "fabric=cpu").status == 0
        gone = load_checkpoint(tmp_path / "more", tensors=False)
        assert gone.run.tokens_from.data["epochs"] == 3
        assert gone.train_state.fingerprint == seen.train_state.fingerprint
        assert gone.train_state.next_batch == seen.train_state.next_batch + 2

    def test_another_seed_is_refused_in_a_run_that_has_begun(
        self, command: Command, files: Path, tmp_path: Path
    ) -> None:
        run = ["train", *SMALL, *self.given(files), f"out={tmp_path / 'run'}"]
        assert command(*run).status == 0
        message = "with another configuration: seed must be 0, got 1. Restore it, or choose another"
        assert message in command(*run, "seed=1").err

    def test_without_a_tokenizer_the_way_out_is_named(
        self, command: Command, files: Path, tmp_path: Path
    ) -> None:
        outcome = command("train", *SMALL, *self.given(files)[:3], f"out={tmp_path / 'run'}")
        assert outcome.status == 2
        assert outcome.err == (
            "tokengrow train: tokenizer.file is missing. data=megatron holds token ids, from which "
            "no tokenizer can be trained. Give tokenizer=file tokenizer.file=PATH, the tokenizer "
            "of the data.\n"
        )

    def test_token_files_are_no_text_to_tokenise(
        self, command: Command, files: Path, tmp_path: Path
    ) -> None:
        outcome = command("data", *self.given(files)[:2], f"out={tmp_path / 'other'}")
        assert outcome.status == 2
        assert outcome.err == (
            "tokengrow data: data must be a text source, got megatron, which holds token ids. "
            "Train on it directly.\n"
        )


def test_an_unknown_format_is_named(command: Command, arguments: list[str], tmp_path: Path) -> None:
    for wrong, remedy in (
        ("parquet", "Valid values: store, megatron."),
        ("megtron", "Did you mean 'megatron'?"),
    ):
        outcome = command("data", *arguments, f"to={wrong}")
        assert outcome.status == 2
        assert outcome.err == f"tokengrow data: Unknown format to={wrong}. {remedy}\n"
    assert not (tmp_path / "store").exists()
