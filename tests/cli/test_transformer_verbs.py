"""`model=transformer-*` on the command line: sizes, training, and what it cannot be asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokengrow.data.store import TokenStore
from tokengrow.model.transformer import TransformerConfig
from tokengrow.training.config import TrainConfig
from tokengrow.training.model_section import resolve_model
from tokengrow.training.recipe import resolve_train
from tokengrow.training.trainer import fit

Command = Callable[..., Any]
Composed = Callable[..., dict[str, Any]]

PYTHIA = {
    "transformer-160m": (162_322_944, 85_056_000),
    "transformer-410m": (405_334_016, 302_311_424),
    "transformer-1b": (1_011_781_632, 805_736_448),
    "transformer-1.4b": (1_414_647_808, 1_208_602_624),
}
"""Parameters of the published models, with and without embeddings (their README)."""


@pytest.fixture(scope="module")
def trained(
    transformer_run: Callable[..., TrainConfig],
    store: TokenStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The last checkpoint of a Transformer, after two updates; not to be written to."""
    sections = {"data": {"source": "stdlib", "validation_fraction": 0.05}, "tokenizer": {}}
    tokens_from = {**sections, "store": str(store.folder)}
    out = tmp_path_factory.mktemp("trained") / "run"
    folder = fit(transformer_run(out, steps=2, tokens_from=tokens_from), store).checkpoint.folder
    assert folder is not None
    return folder


@pytest.mark.parametrize("name", PYTHIA)
def test_a_size_of_pythia_has_its_parameters(name: str, composed: Composed) -> None:
    model = resolve_model(composed("plan", f"model={name}")["model"])
    looked_up = 2 * model.vocab_size * model.width
    assert (model.num_parameters(), model.num_parameters() - looked_up) == PYTHIA[name]
    assert model.init == "published"


@pytest.mark.parametrize("name", ["tiny", "12x512"])
def test_a_size_stands_beside_its_tokenformer(name: str, composed: Composed) -> None:
    found, beside = (
        resolve_model(composed("plan", f"model={each}")["model"])
        for each in (f"transformer-{name}", name)
    )
    assert found == TransformerConfig.matching(beside)


def test_plan_counts_a_transformer(command: Command) -> None:
    outcome = command("plan", "model=transformer-160m", "fabric=cpu")
    assert (outcome.status, outcome.err) == (0, "")
    assert "162,322,944" in outcome.out


def test_it_is_measured_and_trained_from_the_command_line(
    command: Command, store: TokenStore, tmp_path: Path
) -> None:
    recipe = ["recipes=quickstart", "model=transformer-tiny", "~stages.medium", "~stages.large"]
    small = ["stages.small.steps=2", "batch_size=2", "micro_batch_size=2", "model.layers=1"]
    short = ["validation_sequences=2", "optim.warmup_steps=1", f"store={store.folder}"]
    given = [*recipe, *small, *short, "fabric=cpu", f"out={tmp_path / 'run'}"]
    planned = command("plan", *given, "flops_per_second=measured")
    assert planned.status == 0 and "small" in planned.out
    trained = command("train", *given)
    assert trained.status == 0
    assert f"checkpoint  {tmp_path / 'run' / 'step_00000002'}" in trained.out


def test_it_generates(command: Command, trained: Path) -> None:
    outcome = command("generate", f"source={trained}", "prompt=import", "sampling.max_tokens=4")
    assert outcome.status == 0 and outcome.out.startswith("import")


def test_a_run_goes_on_from_one(composed: Composed, trained: Path) -> None:
    given = "recipes=continue", f"source={trained}", "stages.continued.steps=1"
    (stage,) = resolve_train(composed("train", *given)).stages
    assert isinstance(stage.model, TransformerConfig)


# What it cannot be asked for


def test_the_stages_of_a_ladder_are_refused_together(command: Command, tmp_path: Path) -> None:
    given = "recipes=quickstart", "model=transformer-tiny", f"out={tmp_path / 'run'}"
    outcome = command("train", *given)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err == (
        "tokengrow train: stages medium, large change the model, but a transformer cannot grow. "
        "Remove them ('~stages.medium' '~stages.large'), and train each size in a run of its own.\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("verb", "given", "said"),
    [
        ("grow", "model.layers=4", "model must keep the sizes of the source, because a tra"),
        ("grow", "model.tokens.ffn=4", "model must keep the sizes of the source, because a tra"),
        ("grow", "growth=stack", "source must be a TokenFormer, got a transformer. Train each"),
        ("plan", "model.width=64", "model must keep the sizes of the source, because a tra"),
        (
            "prune",
            "model.tokens.ffn=4",
            "source must be a TokenFormer, got a transformer. Only parameter tokens",
        ),
        (
            "convert",
            "to=hf",
            "source must be a TokenFormer, got a transformer. to=hf exports no other",
        ),
        (
            "convert",
            "to=neox",
            "source must be a TokenFormer, got a transformer. The published format",
        ),
    ],
)
def test_a_verb_for_tokenformers_says_so(
    verb: str, given: str, said: str, command: Command, trained: Path, tmp_path: Path
) -> None:
    out = [] if verb == "plan" else [f"out={tmp_path / 'out'}"]
    outcome = command(verb, f"source={trained}", given, *out)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith(f"tokengrow {verb}: ") and said in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["grow", "prune"])
def test_a_tokenformer_becomes_none(
    verb: str, command: Command, source: Path, tmp_path: Path
) -> None:
    given = f"source={source}", "model=transformer-tiny", f"out={tmp_path / 'out'}"
    outcome = command(verb, *given)
    assert outcome.status == 2
    assert "model.architecture" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        (
            "transformer-tiny",
            "tokens.ffn=8",
            "model.tokens is a key of a tokenformer, but the model is a transformer. Remove",
        ),
        (
            "tiny",
            "tied=false",
            "model.tied is a key of a transformer, but the model is a tokenformer. Remove",
        ),
    ],
)
def test_a_key_of_the_other_is_refused(model: str, given: str, said: str, command: Command) -> None:
    outcome = command("plan", f"model={model}", f"model.{given}")
    assert outcome.status == 2
    assert outcome.err.startswith(f"tokengrow plan: {said}")
