"""`tokengrow prune`: a smaller checkpoint from which training goes on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tokengrow.checkpoint.layout import WEIGHTS
from tokengrow.checkpoint.schema import TokensFrom
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from tokengrow.data.corpus import TextCorpus
from tokengrow.data.loader import evenly_spaced_batch
from tokengrow.data.store import TokenStore, build_store
from tokengrow.data.tokenizer import TokenizerConfig, train_tokenizer
from tokengrow.files import sha256

Command = Callable[..., Any]
SMALLER = ("model.tokens.ffn=9", "model.tokens.query=6")


@pytest.fixture
def pruned(command: Command, source: Path, tmp_path: Path) -> tuple[Any, Path]:
    """What pruning the FFN from 16 to 9 and the query from 8 to 6 said, and where it is."""
    out = tmp_path / "pruned"
    return command("prune", f"source={source}", f"out={out}", *SMALLER), out


def test_the_pruned_checkpoint_is_whole(pruned: tuple[Any, Path], source: Path) -> None:
    before, after = load_checkpoint(source), load_checkpoint(pruned[1])
    assert (after.config.tokens.ffn, after.config.tokens.query) == (9, 6)
    assert after.config.tau.ffn < before.config.tau.ffn
    assert after.config.tau.value == before.config.tau.value
    assert after.optimizer["exp_avg_sq.blocks.1.ffn.value_param_tokens"].shape == (9, 32)
    assert after.optimizer["step.blocks.1.ffn.value_param_tokens"] == 2
    assert (after.tokenizer, after.end_of_text) == (before.tokenizer, before.end_of_text)
    assert (after.run, after.step) == (before.run, 2)


def test_the_lineage_says_that_it_was_pruned_and_from_what(
    pruned: tuple[Any, Path], source: Path
) -> None:
    (entry,) = load_checkpoint(pruned[1]).lineage
    assert entry.operation == "prune"
    assert entry.source.weights_sha256 == sha256(source / WEIGHTS)
    assert entry.target.config["tokens"]["ffn"] == 9
    assert entry.steps[0].changes["tokens.query"] == [8, 6]


def test_the_drift_is_measured_on_validation_text(
    pruned: tuple[Any, Path], source: Path, store: TokenStore
) -> None:
    probe = evenly_spaced_batch(store.sequences("validation", 32), 16)
    drift = load_checkpoint(pruned[1]).lineage[-1].drift
    for folder, key in ((source, "loss_source"), (pruned[1], "loss_grown")):
        with torch.inference_mode():
            logits = load_checkpoint(folder).model(probe[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), probe[:, 1:].flatten()).item()
        assert getattr(drift, key) == pytest.approx(loss, rel=1e-5)


def test_it_says_what_was_taken_that_it_is_not_exact_and_where_the_result_is(
    pruned: tuple[Any, Path],
) -> None:
    outcome, out = pruned
    assert (outcome.status, outcome.err) == (0, "")
    words = outcome.out.split()
    place = words.index("tokens.ffn")
    assert words[place : place + 3] == ["tokens.ffn", "16", "9"]
    assert words[place + 3].endswith("%")
    assert "not the same function: over 512 validation tokens" in " ".join(words)
    assert str(out / "step_00000002") in outcome.out


def test_training_goes_on_from_it(
    command: Command, pruned: tuple[Any, Path], tmp_path: Path
) -> None:
    on = [f"source={pruned[1]}", f"out={tmp_path / 'on'}", "stages.continued.steps=1", "fabric=cpu"]
    outcome = command("train", "recipes=continue", *on)
    assert outcome.status == 0, outcome.err
    last = load_checkpoint(tmp_path / "on")
    assert last.config == load_checkpoint(pruned[1]).config
    assert last.optimizer["step.embedding.weight"] == 3


def test_a_growth_is_undone(
    command: Command, source: Path, store: TokenStore, tmp_path: Path
) -> None:
    grown, back = tmp_path / "grown", tmp_path / "back"
    command("grow", f"source={source}", f"out={grown}", "model.tokens.ffn=40")
    given = [f"source={grown}", f"out={back}", f"store={store.folder}", "model.tokens.ffn=16"]
    assert command("prune", *given).status == 0
    before, after = load_checkpoint(source), load_checkpoint(back)
    assert after.config == before.config
    for held, found in ((before.weights, after.weights), (before.optimizer, after.optimizer)):
        assert all(torch.equal(found[name], tensor) for name, tensor in held.items())
    operations = [entry.operation for entry in after.lineage]
    assert operations == ["grow", "prune"]


@pytest.fixture
def refused(command: Command, tmp_path: Path) -> Command:
    """`refused(*arguments)`: asserts how a wrong input ends; gives the sentence."""

    def call(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        out = [] if any(word.startswith("out=") for word in arguments) else [f"out={tmp_path}/new"]
        outcome = command("prune", *arguments, *out)
        (line,) = outcome.err.splitlines()
        assert outcome.status == 2
        assert sorted(tmp_path.rglob("*")) == before, "nothing may be written"
        return str(line.removeprefix("tokengrow prune: "))

    return call


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model.tokens.ffn=20"], "model.tokens.ffn must be at most 16, got 20. Pruning never"),
        (["model.layers=1"], "model.layers must stay 2, got 1. Pruning removes only parameter"),
        ([], "model must be smaller than source, got the same sizes."),
        (
            ["model.tokens.ffn=9", "model.tau.ffn=2"],
            "model.tau must be null, because pruning keeps the value of source. Remove it.",
        ),
        (
            ["model.tokens.ffn=9", "model.rotary_base=5"],
            "model.rotary_base must be null, because pruning keeps the value of source. Remove it.",
        ),
        (["model.tokens.ffn=0"], "model.tokens.ffn must be at least 1, got 0"),
        (["model.tokens.ffn=9", "batch_sequences=0"], "batch_sequences must be at least 1, got 0."),
        (["model.tokens.ffn=9", "store=nowhere"], "nowhere"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(
    refused: Command, source: Path, changes: list[str], said: str
) -> None:
    assert said in refused(f"source={source}", *changes)


def test_an_out_that_exists_is_not_overwritten(refused: Command, source: Path) -> None:
    said = refused(f"source={source}", f"out={source}", *SMALLER)
    assert "nothing is overwritten" in said


def changed(source: Path, folder: Path, **values: Any) -> Path:
    """A copy of the source checkpoint with these fields."""
    return save_checkpoint(folder, replace(load_checkpoint(source), **values))


def test_a_source_that_no_run_made_needs_a_store(
    refused: Command, source: Path, tmp_path: Path
) -> None:
    bare = save_checkpoint(tmp_path / "bare", Checkpoint.of(load_checkpoint(source).model))
    said = refused(f"source={bare}", *SMALLER)
    assert said == "source has no recorded data, because no run wrote it. Give store=DIR."


def test_a_recorded_text_that_is_gone_is_named(
    refused: Command, source: Path, tmp_path: Path
) -> None:
    run = load_checkpoint(source).run
    gone = replace(run, tokens_from=replace(run.tokens_from, store=str(tmp_path / "gone")))
    said = refused(f"source={changed(source, tmp_path / 'moved', run=gone)}", *SMALLER)
    assert said.startswith("The recorded data of source cannot be opened (")
    assert "gone" in said and said.endswith("). Give store=DIR.")


def test_the_text_of_a_recorded_corpus_is_in_the_tokens_of_the_source(
    command: Command, source: Path, corpus: TextCorpus, store: TokenStore, tmp_path: Path
) -> None:
    data = {
        "source": "text",
        "files": corpus.files,
        "validation_files": corpus.validation_files,
    }
    tokens_from = TokensFrom(data=data, tokenizer={"vocab_size": 300}, store=None)
    run = replace(load_checkpoint(source).run, tokens_from=tokens_from)
    moved = changed(source, tmp_path / "moved", run=run)
    outcomes = [
        command("prune", f"source={moved}", f"out={tmp_path / name}", *SMALLER, *more)
        for name, more in (("recorded", []), ("given", [f"store={store.folder}"]))
    ]
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes
    recorded, given = (load_checkpoint(tmp_path / name) for name in ("recorded", "given"))
    assert recorded.lineage[-1].drift == given.lineage[-1].drift


def test_tokens_of_another_tokenizer_are_refused(
    refused: Command, source: Path, corpus: TextCorpus, tmp_path: Path
) -> None:
    other = train_tokenizer(TokenizerConfig(vocab_size=300), corpus)
    store = build_store(corpus, other, tmp_path / "store", progress=False)
    said = refused(f"source={source}", f"store={store.folder}", *SMALLER)
    assert said == (
        f"store={store.folder} holds tokens of another tokenizer than that of source. Give a "
        "store= made with the tokenizer.json of source."
    )
