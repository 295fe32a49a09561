"""The study of five arms: what is equal between them, and what they show in miniature."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.paths import data_root
from tokengrow.training.config import TrainConfig
from tokengrow.training.recipe import resolve_train

Composed = Callable[..., dict[str, Any]]
Command = Callable[..., Any]

STUDY = "study-grown-vs-scratch"
ARMS = ("grown", "published", "scratch", "small", "transformer")
SETTINGS = {"tiny": [], "books": ["data.files=[book.txt]"]}


@pytest.fixture
def arms(composed: Composed) -> Callable[[str], dict[str, TrainConfig]]:
    """`arms(setting)`: name of each arm to its run."""

    def resolve(setting: str) -> dict[str, TrainConfig]:
        recipe, given = f"{STUDY}/{setting}", SETTINGS[setting]
        return {
            arm: resolve_train(
                composed("train", f"recipes={recipe}", f"recipes/{recipe}/arm={arm}", *given)
            )
            for arm in ARMS
        }

    return resolve


def flops(run: TrainConfig) -> int:
    tokens = [run.batch_size * stage.model.context_length * stage.steps for stage in run.stages]
    each = (stage.model.flops_per_token() for stage in run.stages)
    return sum(count * per_token for count, per_token in zip(tokens, each, strict=True))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_sweep_of_a_study_goes_through_its_arms(setting: str) -> None:
    folder = data_root() / "recipes" / STUDY
    assert {path.stem for path in (folder / setting / "arm").glob("*.yaml")} == set(ARMS)
    swept = f"recipes/{STUDY}/{setting}/arm: {','.join(ARMS)}\n"
    assert swept in (folder / f"{setting}.yaml").read_text()


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_arms_spend_the_same_flops_on_the_same_batches(
    setting: str, arms: Callable[[str], dict[str, TrainConfig]], composed: Composed
) -> None:
    budget = composed("train", f"recipes={STUDY}/{setting}", *SETTINGS[setting])["flops"]
    runs = arms(setting)
    for run in runs.values():
        last = run.stages[-1].model
        update = run.batch_size * last.context_length * last.flops_per_token()
        assert budget <= flops(run) < budget + update  # whole updates, rounded up
        assert len(run.stages) == 1 or run.stages[0].steps > 1
    # What the order of the data is a function of, and what else must not differ.
    for key in ("seed", "batch_size", "tokens_from", "validation_sequences"):
        assert len({str(getattr(run, key)) for run in runs.values()}) == 1
    assert len({stage.model.context_length for run in runs.values() for stage in run.stages}) == 1
    assert len({stage.optim.lr for run in runs.values() for stage in run.stages}) == 1
    assert len({run.stages[-1].optim.schedule for run in runs.values()}) == 1


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_arms_are_the_sizes_that_they_are_named_after(
    setting: str, arms: Callable[[str], dict[str, TrainConfig]]
) -> None:
    sizes = {name: [stage.model for stage in run.stages] for name, run in arms(setting).items()}
    small, large = sizes["grown"]
    assert sizes["published"][0] == sizes["small"][0] == small
    assert sizes["published"][1].tokens == sizes["scratch"][0].tokens == large.tokens
    (transformer,) = sizes["transformer"]
    assert transformer.architecture == "transformer"
    assert transformer.num_parameters() == pytest.approx(large.num_parameters(), rel=0.02)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_in_miniature_exact_growth_is_ahead_of_the_published_one(
    tmp_path: Path, program: Callable[..., Any]
) -> None:
    out = tmp_path / "study"
    study = ["train", "--multirun", f"recipes={STUDY}/tiny", f"out={out}"]
    done = program(*study, timeout=1700)  # some seven minutes where nothing else runs
    assert done.status == 0, done.err
    ends = {}
    for arm in ARMS:
        state = load_checkpoint(out / f"arm={arm}", tensors=False).train_state
        ends[arm] = state.rungs[-1]
    grown, published = ends["grown"], ends["published"]
    assert grown.loss_start == pytest.approx(grown.loss_before, abs=1e-4)
    assert published.loss_start > published.loss_before + 0.1
    assert grown.loss_end < published.loss_end
    assert grown.loss_end < ends["scratch"].loss_end
