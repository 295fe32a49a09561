"""Training with compiled blocks: the same results, compiled for each size."""

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tokengrow.data.store import TokenStore
from tokengrow.errors import UserError
from tokengrow.growth.config import GrowthConfig
from tokengrow.training import trainer
from tokengrow.training.config import TrainConfig
from tokengrow.training.trainer import fit

Runs = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def compiled_code_goes() -> Iterator[None]:
    yield
    torch.compiler.reset()


def test_a_ladder_is_the_same_run(tiny_run: Runs, store: TokenStore, tmp_path: Path) -> None:
    plain = fit(tiny_run(tmp_path / "plain", rungs=(8, 12)), store).state
    run = tiny_run(tmp_path / "compiled", rungs=(8, 12), compile=True)
    compiled = fit(run, store).state
    for found, wanted in zip(compiled.validation, plain.validation, strict=True):
        assert found.loss == pytest.approx(wanted.loss, rel=1e-5)


def test_a_stage_whose_tau_moves_is_compiled_once_it_has_arrived(
    tiny_run: Runs,
    tiny_model: Callable,
    store: TokenStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled_at: list[float] = []

    def noted(blocks: torch.nn.ModuleList) -> None:
        compiled_at.append(blocks[0].ffn.tau)

    # What is noted as compiled is not compiled here: the other tests do that.
    monkeypatch.setattr(trainer, "compile_blocks", noted)
    monkeypatch.setattr(trainer, "is_compiled", lambda block: block.ffn.tau in compiled_at)
    run = tiny_run(tmp_path / "run", rungs=(8, 12), compile=True)
    small, large = run.stages
    large = replace(large, model=tiny_model(12))
    growth = GrowthConfig(tau="anneal", anneal_steps=3)
    log = io.StringIO()
    fit(replace(run, stages=(small, large), growth=growth), store, Console(file=log))
    assert compiled_at == [small.model.tau.ffn, large.model.tau.ffn]
    said = "compiling the blocks; the first update takes longer\n"
    assert log.getvalue().count(said) == 2, "a log file is not silent meanwhile"


def test_compiled_kernel_handles_many_shapes(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path / "run", steps=2, kernel="compiled", validation_sequences=6)
    state = fit(run, store).state
    plain = fit(replace(run, out=str(tmp_path / "plain"), kernel="reference"), store).state
    assert state.rungs[-1].loss_end == pytest.approx(plain.rungs[-1].loss_end, rel=1e-5)


def test_unsupported_kernel_is_refused_before_writing(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path / "run", kernel="triton")
    with pytest.raises(UserError, match="kernel must be auto or reference on a CPU, got 'triton'"):
        fit(run, store)
    assert not (tmp_path / "run").exists()


def test_an_unknown_kernel_is_refused_with_the_valid_ones(tiny_run: Runs, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"kernel must be one of auto, reference, compiled, triton, fp8, got 'fast'\.$",
    ):
        tiny_run(tmp_path / "run", kernel="fast")


def test_renamed_kernel_is_refused_with_its_new_name(tiny_run: Runs, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"kernel must be one of auto, reference, compiled, triton, fp8, got 'naive'\. "
        r"It is called 'reference' now\.$",
    ):
        tiny_run(tmp_path / "run", kernel="naive")
