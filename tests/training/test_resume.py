"""A run resumes only with a matching config; otherwise it is refused and nothing changes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tokengrow.checkpoint.layout import WEIGHTS
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from tokengrow.data.corpus import TextCorpus
from tokengrow.data.store import TokenStore, build_store
from tokengrow.data.tokenizer import TokenizerConfig, train_tokenizer
from tokengrow.errors import UserError
from tokengrow.growth.config import GrowthConfig
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.training.config import TrainConfig
from tokengrow.training.trainer import fit

Runs = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def run(tiny_run: Runs, store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A finished run of two rungs, n8 and n12."""
    config = tiny_run(tmp_path_factory.mktemp("resume") / "run", rungs=(8, 12), steps=2)
    fit(config, store)
    return config


@pytest.fixture(scope="module")
def other_store(corpus: TextCorpus, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Half of the corpus, in tokens of its own."""
    half = TextCorpus(files=corpus.validation_files, validation_files=corpus.files)
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=500), half)
    return build_store(half, tokenizer, tmp_path_factory.mktemp("other") / "s", progress=False)


def stamps(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Change time and content of everything below a folder."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


def refused(config: TrainConfig, store: TokenStore, said: str) -> None:
    """Asserts that the run is refused with these words, and that its folder stays as it is."""
    before = stamps(Path(config.out).parent)
    with pytest.raises(UserError, match=said):
        fit(config, store)
    assert stamps(Path(config.out).parent) == before


def with_stage(run: TrainConfig, index: int, **changes: Any) -> TrainConfig:
    """Return the run with one stage changed."""
    stages = list(run.stages)
    stages[index] = replace(stages[index], **changes)
    return replace(run, stages=tuple(stages))


def test_other_data_is_refused(run: TrainConfig, other_store: TokenStore) -> None:
    refused(run, other_store, "on other data")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, r"seed must be 0, got 1"),
        ({"batch_size": 8}, r"batch_size must be 4, got 8"),
        ({"growth": GrowthConfig(new_value_scale=0.5)}, r"new_value_scale must be 0.1, got 0.5"),
    ],
)
def test_what_shapes_the_result_cannot_change(
    run: TrainConfig, store: TokenStore, change: dict[str, Any], said: str
) -> None:
    refused(replace(run, **change), store, said)


def test_the_optimizer_of_a_passed_stage_cannot_change(run: TrainConfig, store: TokenStore) -> None:
    optim = replace(run.stages[0].optim, lr=1e-2)
    refused(with_stage(run, 0, optim=optim), store, r"stages.n8.optim.lr must be 0.003, got 0.01")


def test_the_steps_of_a_passed_stage_cannot_change(run: TrainConfig, store: TokenStore) -> None:
    refused(with_stage(run, 1, steps=5), store, r"stages.n12.steps must be 2, got 5")


def test_passed_stages_cannot_be_renamed(run: TrainConfig, store: TokenStore) -> None:
    refused(with_stage(run, 0, name="other"), store, "with the stages n8, n12")


def test_what_does_not_shape_the_result_may_change(
    run: TrainConfig, store: TokenStore, tmp_path: Path
) -> None:
    changed = replace(run, log_every=1, keep_checkpoints=5, checkpoint_every=1, validation_every=1)
    assert fit(changed, store).state.step == 4


def test_a_stage_ahead_may_change(tiny_run: Runs, store: TokenStore, tmp_path: Path) -> None:
    fit(tiny_run(tmp_path / "run", rungs=(8,), steps=2), store)
    ahead = tiny_run(tmp_path / "run", rungs=(8, 16), steps=2)
    fit(ahead, store)
    refused(
        with_stage(ahead, 1, optim=replace(ahead.stages[1].optim, lr=1e-2)),
        store,
        r"stages.n16.optim.lr",
    )


def test_checkpoint_with_a_renamed_kernel_resumes(
    tiny_run: Runs, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_dict = TrainConfig.to_dict
    with monkeypatch.context() as patch:
        patch.setattr(TrainConfig, "to_dict", lambda self: {**to_dict(self), "kernel": "naive"})
        folder = fit(tiny_run(tmp_path / "run", rungs=(8,), steps=2), store).checkpoint.folder
    assert folder is not None
    recorded = load_checkpoint(folder).run
    assert recorded is not None and recorded.settings["kernel"] == "naive"
    resumed = tiny_run(tmp_path / "run", rungs=(8, 16), steps=2, kernel="reference")
    assert fit(resumed, store).state.step == 4
    grown = tiny_run(tmp_path / "grown", rungs=(16,), steps=2, source=str(folder))
    assert fit(grown, store).state.step == 2


def test_resume_never_refuses_an_out_that_is_not_empty(run: TrainConfig, store: TokenStore) -> None:
    refused(
        replace(run, resume="never"), store, "must be empty with resume=never. Choose another out="
    )


def test_resume_never_leaves_a_damaged_checkpoint_where_it_is(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    config = tiny_run(tmp_path / "run", rungs=(8,), steps=1)
    folder = fit(config, store).checkpoint.folder
    assert folder is not None
    (folder / WEIGHTS).write_bytes(b"damaged")
    refused(replace(config, resume="never"), store, "must be empty")


def test_resume_never_takes_an_empty_out(tiny_run: Runs, store: TokenStore, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    config = tiny_run(tmp_path / "run", rungs=(8,), steps=1, resume="never")
    assert fit(config, store).state.step == 1


def test_an_out_that_is_not_a_run_is_refused(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    refused(tiny_run(tmp_path / "photos"), store, "holds files that are not a run")


def test_an_out_that_is_a_file_is_refused(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    refused(tiny_run(tmp_path / "file"), store, "out=.*file")


def test_an_out_with_a_checkpoint_that_no_run_wrote_is_refused(
    tiny_run: Runs, tiny_model: Callable[..., ModelConfig], store: TokenStore, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "grown" / "step_00000000", TokenFormer(tiny_model()))
    refused(tiny_run(tmp_path / "grown"), store, "a checkpoint that no run wrote")


def test_a_source_with_another_tokenizer_is_refused(
    run: TrainConfig, tiny_run: Runs, other_store: TokenStore, tmp_path: Path
) -> None:
    config = tiny_run(tmp_path / "run", rungs=(12,), source=run.out)
    refused(config, other_store, "was trained with another tokenizer")


def test_a_source_that_does_not_exist_is_refused(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    config = tiny_run(tmp_path / "run", source=str(tmp_path / "nowhere"))
    refused(config, store, "nowhere does not exist")


def test_a_source_larger_than_the_first_stage_is_refused(
    run: TrainConfig, tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    config = tiny_run(tmp_path / "run", rungs=(8,), source=run.out)  # the run ended with n12
    refused(
        config,
        store,
        "model.tokens.query must be at least 12, got 8. Growth never makes a ",
    )


def test_a_source_without_a_tokenizer_is_taken_at_its_word(
    run: TrainConfig, tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    last = load_checkpoint(run.out)
    bare = save_checkpoint(tmp_path / "step_00000000", Checkpoint(last.config, last.weights))
    config = tiny_run(tmp_path / "run", rungs=(12,), steps=1, source=str(bare))
    config = with_stage(config, 0, model=last.config)
    assert last.train_state is not None
    loss_start = fit(config, store).state.rungs[0].loss_start
    assert loss_start == pytest.approx(last.train_state.rungs[-1].loss_end)
