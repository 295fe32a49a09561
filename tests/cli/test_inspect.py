"""`tokengrow inspect`: what a checkpoint is, printed, and written where asked."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokengrow.checkpoint.store import Checkpoint, save_checkpoint
from tokengrow.data.store import TokenStore
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.training.trainer import fit

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def run(
    tiny_run: Callable[..., Any], store: TokenStore, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A ladder of two rungs with a checkpoint every second update; not to be written to."""
    out: Path = tmp_path_factory.mktemp("ladder") / "run"
    tokens_from = {"data": {"source": "stdlib"}, "tokenizer": {}, "store": str(store.folder)}
    config = tiny_run(
        out, (8, 12), 4, checkpoint_every=2, keep_checkpoints=9, tokens_from=tokens_from
    )
    fit(config, store)
    return out


def test_it_prints_what_the_newest_checkpoint_is_and_writes_nothing(
    command: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = command("inspect", f"source={run}")
    assert (outcome.status, outcome.err) == (0, "")
    said = " ".join(outcome.out.split())
    assert "step_00000008" in said
    assert "1 tokens attention 8 -> 12 4 " in said, "grown at step 4"
    assert "Contribution by generation in %, on 512 tokens of text" in said, "16 sequences of 32"
    assert "effective number: (Σ c)² / Σ c²" in said
    assert list(tmp_path.iterdir()) == []


def test_figures_and_plots_go_into_out(command: Command, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "looked"
    outcome = command("inspect", f"source={run}", f"out={out}", "sequences=2", "history=true")
    assert outcome.status == 0, outcome.err
    assert sorted(path.name for path in out.iterdir()) == [
        "history.png",
        "inspection.json",
        "tokens.png",
    ]
    figures = json.loads((out / "inspection.json").read_text())
    assert figures["text_tokens"] == 64
    assert [row["step"] for row in figures["history"]] == [2, 4, 6, 8]
    assert [len(row["tokens"]) for row in figures["history"]] == [1, 1, 2, 2]
    assert figures["history"][-1]["shares"] == figures["shares"]
    shares = [row["shares"]["ffn"][1] for row in figures["history"][2:]]
    assert 0 < shares[0] < shares[1], "they wake up"


def test_right_after_a_growth_its_tokens_do_nothing(
    command: Command, source: Path, tmp_path: Path
) -> None:
    grown, out = tmp_path / "grown", tmp_path / "looked"
    command("grow", f"source={source}", f"out={grown}", "model.tokens.ffn=40")
    outcome = command("inspect", f"source={grown}", f"out={out}")
    assert outcome.status == 0, outcome.err
    figures = json.loads((out / "inspection.json").read_text())
    assert figures["shares"]["ffn"] == [1.0, 0.0]
    assert [each["updates"] for each in figures["generations"]] == [2, 0]


def test_a_pruned_checkpoint_is_told_from_its_source(
    command: Command, source: Path, tmp_path: Path
) -> None:
    grown, pruned = tmp_path / "grown", tmp_path / "pruned"
    command("grow", f"source={source}", f"out={grown}", "model.tokens.ffn=40")
    command("prune", f"source={grown}", f"out={pruned}", "model.tokens.ffn=20")
    command("inspect", f"source={pruned}", f"out={tmp_path / 'looked'}")
    figures = json.loads((tmp_path / "looked" / "inspection.json").read_text())
    ffn = [layer["tokens"] for layer in figures["layers"] if layer["role"] == "ffn"]
    assert ffn == [[16, 4, 0], [16, 4, 0]]


def test_a_damaged_checkpoint_is_left_out_of_a_history(
    command: Command, run: Path, tmp_path: Path
) -> None:
    copy, out = tmp_path / "run", tmp_path / "looked"
    shutil.copytree(run, copy)
    (copy / "step_00000004" / "model.safetensors").write_bytes(b"damaged")
    outcome = command("inspect", f"source={copy}", "history=true", f"out={out}")
    assert outcome.status == 0, outcome.err
    damaged = copy / "step_00000004" / "model.safetensors"
    message = (
        f"skipped: {damaged} must have 96272 bytes, got 7. Use another checkpoint of this run."
    )
    assert message in " ".join(outcome.out.split())
    figures = json.loads((out / "inspection.json").read_text())
    assert [row["step"] for row in figures["history"]] == [2, 6, 8]


@pytest.fixture
def bare(tiny_model: Callable[..., ModelConfig], tmp_path: Path) -> Path:
    """A folder of one checkpoint that no run made."""
    folder = tmp_path / "bare" / "step_00000000"
    return save_checkpoint(folder, Checkpoint.of(TokenFormer(tiny_model(8)))).parent


def test_a_bare_model_shows_its_tokens_lengths_and_says_how_to_give_text(
    command: Command, bare: Path, tmp_path: Path
) -> None:
    outcome = command("inspect", f"source={bare}", f"out={tmp_path / 'looked'}")
    assert outcome.status == 0, outcome.err
    said = " ".join(outcome.out.split())
    assert "Length of keys and values by generation" in said
    assert (
        "Contributions are not measured. source has no recorded data, because no run wrote it. "
        "Give store=DIR."
    ) in said
    assert [path.name for path in (tmp_path / "looked").iterdir()] == ["inspection.json"]


def test_a_store_is_text_for_a_bare_model(command: Command, bare: Path, store: TokenStore) -> None:
    outcome = command("inspect", f"source={bare}", f"store={store.folder}")
    assert outcome.status == 0, outcome.err
    assert "Effective number of tokens" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sequences=0"], "sequences must be at least 1, got 0."),
        (["store=nowhere"], "nowhere"),
        (["history=true"], "source must be a run with history=true, got the checkpoint "),
        (["sequence=4"], "Unknown key sequence. Did you mean 'sequences'?"),
    ],
    ids=str,
)
def test_a_wrong_input_is_one_sentence(
    command: Command, source: Path, tmp_path: Path, arguments: list[str], said: str
) -> None:
    outcome = command("inspect", f"source={source}", f"out={tmp_path / 'looked'}", *arguments)
    (line,) = outcome.err.splitlines()
    assert outcome.status == 2
    assert said in line
    assert not (tmp_path / "looked").exists()


def test_a_history_without_text_is_refused(command: Command, bare: Path) -> None:
    outcome = command("inspect", f"source={bare}", "history=true")
    assert outcome.status == 2
    assert outcome.err == (
        "tokengrow inspect: history=true cannot measure contributions. source has no recorded "
        "data, because no run wrote it. Give store=DIR.\n"
    )


def test_an_out_that_exists_is_not_overwritten(command: Command, run: Path) -> None:
    before = sorted(run.rglob("*"))
    outcome = command("inspect", f"source={run}", f"out={run}")
    assert outcome.status == 2
    assert "nothing is overwritten" in outcome.err
    assert sorted(run.rglob("*")) == before


def test_a_source_is_named_when_it_is_missing(command: Command) -> None:
    assert "source is missing" in command("inspect").err


def test_a_model_is_never_in_memory_as_a_whole(
    tiny_model: Callable[..., ModelConfig],
    store: TokenStore,
    peak_memory: Callable[..., int],
    tmp_path: Path,
) -> None:
    peaks = []
    for n in (8, 4_000):
        config = tiny_model(n, layers=12, width=64, head_dim=32)
        model = TokenFormer(config)
        folder = save_checkpoint(tmp_path / str(n), Checkpoint.of(model))
        words = [f"source={folder}", f"store={store.folder}", "sequences=1"]
        peaks.append(peak_memory("inspect", *words))
        size = (folder / "model.safetensors").stat().st_size
    assert size > 140e6
    assert peaks[1] - peaks[0] < 0.3 * size
