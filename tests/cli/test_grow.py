"""`tokengrow grow`: a larger checkpoint of the same function, with its lineage."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tokengrow.checkpoint.layout import WEIGHTS
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint
from tokengrow.data.store import TokenStore
from tokengrow.files import sha256
from tokengrow.growth.config import GrowthConfig
from tokengrow.model.config import Taus
from tokengrow.parsing import parse_dataclass

Command = Callable[..., Any]
Composed = Callable[..., dict[str, Any]]

ONE_STEP = [
    "recipes=continue",
    "stages.continued.steps=1",
    "batch_size=2",
    "micro_batch_size=2",
    "fabric=cpu",
]
"""Going on from a checkpoint for one update."""


@pytest.fixture
def grown(command: Command, source: Path, store: TokenStore, tmp_path: Path) -> tuple[Any, Path]:
    """What growing the FFN from 16 to 40 parameter tokens said, and where it is."""
    out = tmp_path / "grown"
    given = [f"source={source}", f"store={store.folder}", f"out={out}"]
    return command("grow", *given, "model.tokens.ffn=40"), out


def test_the_grown_checkpoint_is_the_same_function(grown: tuple[Any, Path], source: Path) -> None:
    outcome, out = grown
    assert outcome.status == 0
    before, after = load_checkpoint(source), load_checkpoint(out)
    ids = torch.arange(32)[None]
    with torch.inference_mode():
        difference = before.model.double()(ids) - after.model.double()(ids)
    assert difference.abs().max() < 1e-12
    assert after.config.tokens.ffn == 40
    assert after.config.tau == before.config.tau


def test_the_optimizer_state_and_the_tokenizer_come_along(
    grown: tuple[Any, Path], source: Path
) -> None:
    before, after = load_checkpoint(source), load_checkpoint(grown[1])
    key = "exp_avg.blocks.1.ffn.key_param_tokens"
    assert torch.equal(after.optimizer[key][:16], before.optimizer[key])
    assert not after.optimizer[key][16:].any()
    assert (after.tokenizer, after.end_of_text) == (before.tokenizer, before.end_of_text)
    assert after.step == before.step == 2


def test_the_lineage_names_the_source_and_the_drift(grown: tuple[Any, Path], source: Path) -> None:
    (entry,) = load_checkpoint(grown[1]).lineage
    assert entry.source.weights_sha256 == sha256(source / WEIGHTS)
    assert entry.drift.probe_tokens == 2 * 32, "two sequences of the store"
    assert entry.drift.relative < 1e-10


def test_it_says_what_changed_and_where_the_result_is(grown: tuple[Any, Path]) -> None:
    outcome, out = grown
    words = outcome.out.split()
    place = words.index("tokens.ffn")
    assert words[place : place + 3] == ["tokens.ffn", "16", "40"]
    assert str(out / "step_00000002") in outcome.out
    assert outcome.err == ""


def test_without_a_store_the_probe_is_random(
    command: Command, source: Path, tmp_path: Path
) -> None:
    outcome = command("grow", f"source={source}", f"out={tmp_path / 'g'}", "model.tokens.query=9")
    assert outcome.status == 0
    assert "random tokens" in " ".join(outcome.out.split())


def test_a_grown_checkpoint_can_be_trained_on(
    command: Command, grown: tuple[Any, Path], store: TokenStore, tmp_path: Path
) -> None:
    outcome = command(
        "train",
        f"source={grown[1]}",
        f"store={store.folder}",
        f"out={tmp_path / 'on'}",
        *ONE_STEP,
    )
    assert outcome.status == 0, outcome.err
    last: Checkpoint = load_checkpoint(tmp_path / "on")
    assert last.config.tokens.ffn == 40
    assert last.optimizer["step.embedding.weight"] == 3


def test_a_checkpoint_can_be_trained_on_with_data_in_place_of_a_store(
    command: Command, corpus: Any, source: Path, tmp_path: Path
) -> None:
    outcome = command(
        "train",
        f"source={source}",
        "data=text",
        f"data.files={corpus.files}",
        f"data.validation_files={corpus.validation_files}",
        f"out={tmp_path / 'on'}",
        *ONE_STEP,
    )
    assert outcome.status == 0, outcome.err
    assert load_checkpoint(tmp_path / "on").tokenizer == load_checkpoint(source).tokenizer


@pytest.mark.parametrize(
    ("group", "differs"),
    [
        ("zero_key", {}),
        ("gram", {"init": "gram", "tau": "recompute"}),
        ("anneal", {"tau": "anneal"}),
        (
            "stack",
            {"new_blocks": "stack", "new_block_place": "top", "tolerance": float("inf")},
        ),
        (
            "published",
            {
                "init": "published",
                "tau": "recompute",
                "optimizer": "fresh",
                "new_warmup_steps": 0,
                "tolerance": float("inf"),
            },
        ),
    ],
)
def test_a_growth_group_sets_what_belongs_together(
    composed: Composed, group: str, differs: dict[str, Any]
) -> None:
    section = composed("grow", f"growth={group}", "source=x", "out=y")["growth"]
    assert parse_dataclass(GrowthConfig, section) == replace(GrowthConfig(), **differs)


def test_a_gram_growth_goes_into_the_published_layout_and_back(
    command: Command, source: Path, tmp_path: Path
) -> None:
    # Keys of rank 8 (attention) and 16 (FFN).
    tokens = "{query: 20, key: 20, value: 20, output: 40, ffn: 40}"
    given = (f"source={source}", f"model.tokens={tokens}", f"out={tmp_path / 'grown'}")
    assert command("grow", "growth=gram", *given).status == 0
    grown, neox, back = (tmp_path / name for name in ("grown", "neox", "back"))
    assert command("convert", f"source={grown}", "to=neox", f"out={neox}").status == 0
    assert command("convert", f"source={neox}", "to=tokengrow", f"out={back}").status == 0
    first, last = load_checkpoint(source), load_checkpoint(tmp_path / "back")
    assert last.config.tau == Taus.default(last.config.tokens)
    ids = torch.arange(32)[None]
    with torch.inference_mode():
        torch.testing.assert_close(last.model(ids), first.model(ids), rtol=0, atol=1e-5)


def test_zero_keys_have_no_published_word(command: Command, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "grown"
    command("grow", f"source={source}", "model.tokens.ffn=40", f"out={out}")
    outcome = command("convert", f"source={out}", "to=neox", f"out={tmp_path / 'neox'}")
    assert outcome.status == 2
    assert "growth=gram" in outcome.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["growth=gram"], "It must append at least 16 tokens, the rank of the old keys."),
        (["growth.init=gram"], "growth.tau must be recompute with growth.init=gram, got 'keep'"),
        (["growth.tau=recompute"], "is not the same function"),
        (["growth.new_warmup_steps=-1"], "growth.new_warmup_steps must be at least 0, got -1."),
        (["growth.freeze_source=-2"], "growth.freeze_source must be at least -1, got -2."),
        (["growth=stak"], "Did you mean 'stack'?"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_and_nothing_is_written(
    command: Command, source: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    out = tmp_path / "new" / "grown"
    outcome = command("grow", f"source={source}", "model.tokens.ffn=20", f"out={out}", *words)
    assert outcome.status == 2
    assert said in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    words = f"-m tokengrow grow source={source} model.tokens.ffn=400 out={tmp_path}/new/grown"
    limited = f"ulimit -f 100; {sys.executable} {words}"  # 100 kB a file
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("Free disk space, or choose another path.")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_another_function_is_said_to_be_one(command: Command, source: Path, tmp_path: Path) -> None:
    given = (f"source={source}", "model.layers=4")
    exact = command("grow", *given, f"out={tmp_path / 'exact'}").out
    stacked = command("grow", *given, "growth=stack", f"out={tmp_path / 'stacked'}").out
    assert "not the same function: loss" in stacked
    assert "not the same function" not in exact


def test_an_out_where_no_folder_can_be_made_is_refused(command: Command, source: Path) -> None:
    outcome = command("grow", f"source={source}", "model.layers=4", "out=/dev/null/grown")
    assert outcome.status == 2
    assert outcome.err.endswith(": Not a directory. Choose another path.\n")
