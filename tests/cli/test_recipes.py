"""Every shipped recipe and every option of every group: composed, resolved, planned; each recipe
trained for a step."""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from tokengrow.checkpoint.store import Checkpoint, save_checkpoint
from tokengrow.cli.plan_tables import tables
from tokengrow.data.corpus import StdlibCorpus
from tokengrow.data.sections import (
    resolve_corpus,
    resolve_megatron,
    resolve_mixture,
    resolve_tokenizer,
)
from tokengrow.data.store import TokenStore
from tokengrow.data.tokenizer import TokenizerConfig
from tokengrow.distributed.fabric import FabricConfig
from tokengrow.generation.sampling import SamplingConfig
from tokengrow.growth.config import GrowthConfig
from tokengrow.metrics.logger_collection import LoggerConfig
from tokengrow.model.architectures import ARCHITECTURES
from tokengrow.model.config import ModelConfig
from tokengrow.model.presets import PRESETS
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.optim.config import OptimConfig
from tokengrow.paths import data_root, recipes
from tokengrow.planning.cost import run_budget
from tokengrow.training.config import TrainConfig
from tokengrow.training.recipe import resolve_train
from tokengrow.training.trainer import fit

Sources = Callable[[str], Path]
Composed = Callable[..., dict[str, Any]]

RECIPES = recipes()
OPTIONS = sorted(
    path.relative_to(data_root() / "conf").with_suffix("").as_posix()
    for path in (data_root() / "conf").glob("*/**/*.yaml")
)
NEEDED = {  # what an option leaves to its user
    "data/text": ["data.files=[book.txt]"],
    "data/hub": ["data.name=owner/name"],
    "data/megatron": ["data.prefix=files/pile"],
    "data/mixture": ["data.sources={code: {source: stdlib}}"],
    "tokenizer/file": ["tokenizer.file=tokenizer.json"],
}
GIVEN = {
    "data.files=": "data.files=[book.txt]",
    "data.prefix=": "data.prefix=files/pile",
    "tokenizer.file=": "tokenizer.file=tokenizer.json",
}
"""What a recipe's head asks its user for, besides source=."""


@pytest.fixture(scope="module")
def sources(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`sources(recipe)`: a checkpoint that the recipe can start from, for its size alone."""
    folder = tmp_path_factory.mktemp("sizes") / "owt2-354m"
    save_checkpoint(folder, Checkpoint(ModelConfig.preset("owt2-354m"), weights={}))
    return lambda recipe: folder if recipe.startswith("owt2-354m-to") else source


def values_of(recipe: str, composed: Composed, sources: Sources) -> dict[str, Any]:
    """A recipe with what its own head says that its user gives."""
    head = (data_root() / "recipes" / f"{recipe}.yaml").read_text().partition("defaults:")[0]
    given = GIVEN | {"source=": f"source={sources(recipe)}"}
    return composed(
        "train", f"recipes={recipe}", *(word for key, word in given.items() if key in head)
    )


def printed(run: TrainConfig) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*tables(run_budget(run)))
    return console.export_text()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_resolves_and_has_a_plan(
    recipe: str, composed: Composed, sources: Sources
) -> None:
    run = resolve_train(values_of(recipe, composed, sources))
    assert run.tokens_from is not None
    assert resolve_megatron(run.tokens_from.data) or resolve_corpus(run.tokens_from.data)
    resolve_tokenizer(run.tokens_from.tokenizer)
    table = printed(run)
    for stage in run.stages:
        assert f"{stage.model.num_parameters():,}" in table


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_of_a_group_resolves_and_has_a_plan(
    option: str, composed: Composed, source: Path
) -> None:
    group, _, choice = option.rpartition("/")
    given = [f"{group}={choice}", *NEEDED.get(option, [])]
    if group != "model" and choice != "inherit":
        given.append("model=tiny")
    if choice == "inherit":
        given.append(f"source={source}")
    run = resolve_train(composed("train", *given, "+stages.only.steps=3"))
    assert run.tokens_from is not None
    data = run.tokens_from.data
    assert resolve_megatron(data) or resolve_mixture(data) or resolve_corpus(data)
    resolve_tokenizer(run.tokens_from.tokenizer)
    assert "only" in printed(run)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_an_option_of_its_name(name: str, composed: Composed) -> None:
    (stage,) = resolve_train(composed("train", f"model={name}", "+stages.only.steps=1")).stages
    assert stage.model == ModelConfig.preset(name)


def shrunk(run: TrainConfig, out: Path, tiny_model: Callable[..., ModelConfig]) -> TrainConfig:
    """The run in miniature: tiny models that grow where its own grow, one update a stage."""
    stages, n, first = [], 8, tiny_model(8)
    for index, stage in enumerate(run.stages):
        if index and stage.model != run.stages[index - 1].model:
            n += 4
        model = replace(tiny_model(n), tau=first.tau)
        stages.append(replace(stage, steps=1, model=model))
    return replace(
        run,
        out=str(out),
        stages=tuple(stages),
        batch_size=2,
        micro_batch_size=2,
        validation_sequences=2,
        fabric=FabricConfig(accelerator="cpu", precision="32-true"),
        logger=LoggerConfig(kinds=[]),
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_a_step_of_each_stage(
    recipe: str,
    composed: Composed,
    source: Path,
    sources: Sources,
    store: TokenStore,
    tiny_model: Callable[..., ModelConfig],
    tmp_path: Path,
) -> None:
    run = resolve_train(values_of(recipe, composed, sources))
    run = replace(run, source=str(source) if run.source else None)
    state = fit(shrunk(run, tmp_path / "run", tiny_model), store).state
    assert [rung.name for rung in state.rungs] == [stage.name for stage in run.stages]
    assert state.step == len(run.stages)


# recipes=continue: null is what the source's run had.


def test_of_a_source_that_no_run_made_null_is_the_default(
    composed: Composed, tiny_model: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "bare", TokenFormer(tiny_model()))
    given = ["data=text", "data.files=[book.txt]", "optim.lr=1e-4"]
    source = f"source={tmp_path / 'bare'}"
    run = resolve_train(composed("train", "recipes=continue", source, *given))
    assert (run.seed, run.batch_size, run.micro_batch_size) == (0, 64, 16)
    assert run.stages[0].optim == OptimConfig(lr=1e-4, warmup_steps=0)


def test_the_length_of_a_decay_and_how_a_stage_began_are_not_inherited(
    composed: Composed, tiny_run: Callable[..., TrainConfig], store: TokenStore, tmp_path: Path
) -> None:
    settings = OptimConfig(schedule="neox_cosine", warmup_steps=1, decay_steps=2, enter="peak")
    run = tiny_run(tmp_path / "run", rungs=(8,), steps=3)
    stage = replace(run.stages[0], optim=settings)
    tokens_from = {"data": {"source": "stdlib"}, "tokenizer": {}, "store": str(store.folder)}
    fit(replace(run, stages=(stage,), tokens_from=tokens_from), store)
    more = resolve_train(composed("train", "recipes=continue", f"source={tmp_path / 'run'}"))
    assert more.stages[0].optim == replace(
        settings, warmup_steps=0, decay_steps=None, enter="rewarm"
    )


# A recipe says more than the verb's own file, and less than the command line.


def leaves(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings."""
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        if isinstance(value, Mapping):
            yield from leaves(value, path)
        else:
            yield path, value


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_changes_what_it_says_it_changes(
    recipe: str, composed: Composed, sources: Sources
) -> None:
    said: Any = OmegaConf.to_container(OmegaConf.load(data_root() / "recipes" / f"{recipe}.yaml"))
    for key in ("defaults", "hydra"):  # what it is made of, and how it is swept
        said.pop(key, None)
    there = dict(leaves(values_of(recipe, composed, sources)))
    for key, value in leaves(said):
        assert there[key] == value or value == "${tokengrow.missing:}", key


@pytest.mark.parametrize(
    ("recipe", "preset", "batch_size", "tokens", "warmup"),
    [
        ("tokenformer-150m-pile", "150m", 1024, 143_000 * 1024 * 2048, 1430),
        ("tokenformer-450m-pile", "450m", 1024, 143_000 * 1024 * 2048, 1430),
        ("tokenformer-900m-pile", "900m", 1024, 143_000 * 1024 * 2048, 1430),
        ("tokenformer-1.5b-pile", "1.5b", 1024, 143_000 * 1024 * 2048, 1430),
        ("owt2-354m", "owt2-354m", 512, 600_000 * 512 * 1024, 6000),
        ("owt2-354m-to-757m-60k", "owt2-757m", 512, 60_000 * 512 * 1024, 600),
        ("owt2-354m-to-757m-120k", "owt2-757m", 512, 120_000 * 512 * 1024, 1200),
    ],
)
def test_the_published_runs(
    recipe: str,
    preset: str,
    batch_size: int,
    tokens: int,
    warmup: int,
    composed: Composed,
    sources: Sources,
) -> None:
    run = resolve_train(values_of(recipe, composed, sources))
    (stage,) = run.stages
    wanted = ModelConfig.preset(preset)
    assert stage.model.num_parameters() == wanted.num_parameters()
    if run.source is None:
        assert stage.model == wanted
    assert run.batch_size == batch_size
    assert stage.steps * batch_size * stage.model.context_length == tokens
    assert stage.optim == OptimConfig(
        lr=6e-4,
        min_lr=6e-5,
        warmup_steps=warmup,
        schedule="neox_cosine",
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        grad_clip=1.0,
    )
    assert run.seed == 1234


def test_a_recipe_wins_over_the_verbs_own_file(composed: Composed) -> None:
    without, quickstart = composed("train"), composed("train", "recipes=quickstart")
    assert (without["name"], quickstart["name"]) == ("run", "quickstart")
    assert (without["model"]["width"], quickstart["model"]["width"]) == (None, 128)
    assert without["optim"]["lr"] != quickstart["optim"]["lr"]
    assert quickstart["out"] == "runs/quickstart"


def test_the_command_line_changes_a_recipe(composed: Composed) -> None:
    changed = composed("train", "recipes=quickstart", "optim.lr=2e-3", "stages.small.steps=7")
    run = resolve_train(changed)
    assert run.stages[0].optim.lr == 2e-3
    assert run.stages[0].steps == 7


def test_a_stage_takes_the_settings_of_the_run_and_its_own(composed: Composed) -> None:
    stages = "+stages={a: {steps: 1}, b: {steps: 1, optim: {warmup_steps: 0}}}"
    values = composed("train", "model=tiny", "optim.lr=2e-3", "optim.warmup_steps=20", stages)
    a, b = resolve_train(values).stages
    assert (a.optim.lr, a.optim.warmup_steps) == (2e-3, 20)
    assert (b.optim.lr, b.optim.warmup_steps) == (2e-3, 0)


def test_a_ladder_keeps_the_tau_of_its_first_stage(composed: Composed) -> None:
    stages = "+stages={a: {steps: 1}, b: {steps: 1, model: {tokens: {ffn: 1024}}}}"
    a, b = resolve_train(composed("train", "model=tiny", stages)).stages
    assert b.model.tokens.ffn == 1024
    assert a.model.tau == b.model.tau
    assert a.model.tau.ffn == 16  # sqrt(256)


def test_a_dry_run_caps_every_stage_and_writes_elsewhere(composed: Composed) -> None:
    run = resolve_train(composed("train", "recipes=quickstart", "debug=dry_run"))
    assert {stage.steps for stage in run.stages} == {2}
    assert run.out.startswith("runs/dry-run/quickstart-")


def test_a_first_stage_may_name_changes_of_its_own(composed: Composed) -> None:
    values = composed("train", "model=tiny", "+stages.a={steps: 1, model: {layers: 2}}")
    (stage,) = resolve_train(values).stages
    assert stage.model.layers == 2
    assert stage.model.width == 128


def test_the_tokenizer_is_as_large_as_the_models_vocabulary(composed: Composed) -> None:
    values = composed("train", "recipes=quickstart")
    assert resolve_tokenizer(values["tokenizer"], vocab_size=600).vocab_size == 600
    chosen = composed("train", "recipes=quickstart", "tokenizer.vocab_size=500")
    assert resolve_tokenizer(chosen["tokenizer"], vocab_size=600).vocab_size == 500


# The YAML says what the dataclasses say, so that both can be read alone.


@pytest.mark.parametrize(
    ("section", "default"),
    [
        ("optim", OptimConfig()),
        ("growth", GrowthConfig()),
        ("fabric", FabricConfig()),
        ("logger", LoggerConfig()),
        ("data", StdlibCorpus()),
        ("tokenizer", TokenizerConfig()),
    ],
)
def test_a_section_lists_every_setting_with_its_default(
    section: str, default: Any, composed: Composed
) -> None:
    there = composed("train", "model=tiny", "model.vocab_size=4096")[section]
    there.pop("source", None)
    wanted = asdict(default)
    if section == "tokenizer":
        wanted["vocab_size"] = None  # the model's
    if section == "data":
        wanted["validation_fraction"] = 0.05  # fewer files than a corpus for training has
    assert {k: tuple(v) if k == "betas" else v for k, v in there.items()} == wanted


def test_a_run_lists_every_setting_with_its_default(composed: Composed) -> None:
    there = composed("train")
    for field in fields(TrainConfig):
        if field.name == "tokens_from":  # made of data, tokenizer and store
            continue
        assert field.name in there
        if field.default is not MISSING:
            assert there[field.name] == field.default, field.name
    assert there["stages"] == {}


def test_generate_lists_every_setting_with_its_default(composed: Composed) -> None:
    assert composed("generate", "source=x")["sampling"] == asdict(SamplingConfig())


def test_a_model_lists_every_size() -> None:
    inherit = OmegaConf.load(data_root() / "conf" / "model" / "inherit.yaml")
    sizes = {f.name for kind in ARCHITECTURES.values() for f in fields(kind.config)}
    assert set(inherit) == {"architecture", "preset", *sizes}
