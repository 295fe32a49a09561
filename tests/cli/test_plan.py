"""`tokengrow plan`: the numbers of a ladder or a growth, as tables and as JSON."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.cli.plan_tables import tables
from tokengrow.console.format import format_bytes, format_count, format_power
from tokengrow.distributed.fabric import FabricConfig
from tokengrow.growth.plan import plan_growth
from tokengrow.model import tokenformer
from tokengrow.model.config import ModelConfig, ParameterTokens
from tokengrow.planning.cost import growth_budget, run_budget
from tokengrow.training.recipe import resolve_train

Command = Callable[..., Any]

PUBLISHED = "recipes=ladder-150m-to-1.5b", "fabric=cpu"


def local_rows(text: str) -> dict[str, list[str]]:
    """First word of a line to all lines that begin with it, their gaps narrowed to one space."""
    rows: dict[str, list[str]] = {}
    for line in filter(None, (" ".join(line.split()) for line in text.splitlines())):
        rows.setdefault(line.split()[0], []).append(line)
    return rows


def in_json(command: Command, *arguments: str) -> dict[str, Any]:
    """What `--json` prints, which must be one object and nothing else."""
    outcome = command("plan", *arguments, "--json")
    assert (outcome.status, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    assert isinstance(found, dict)
    return found


# A recipe


def test_the_rows_of_a_recipe_are_the_numbers_of_its_budget(
    command: Command, composed: Callable[..., dict[str, Any]]
) -> None:
    outcome = command("plan", "recipes=quickstart", "fabric=cpu")
    assert (outcome.status, outcome.err) == (0, "")
    rows = local_rows(outcome.out)
    values = composed("train", "recipes=quickstart", "fabric=cpu")
    for rung in run_budget(resolve_train(values)).rungs:
        shown = rows[rung.name]
        assert shown[0] == (
            f"{rung.name} {rung.parameters:,} {format_count(rung.flops_per_token)} "
            f"{format_power(rung.scratch_flops)} {format_bytes(rung.checkpoint_bytes)}"
        )
        assert shown[-2].endswith(format_bytes(rung.memory.total))
        assert rung.stage is not None
        assert format_power(rung.stage.cumulative_flops) in shown[-1]


def test_the_published_ladder_worked_by_hand(command: Command) -> None:
    rows = local_rows(command("plan", *PUBLISHED).out)
    sizes, appended, memory, cost = rows["450m"]
    assert sizes.startswith("450m 454,166,528 3.03B 9.08e20 ")
    assert appended == "450m 768 -> 1024 12 -> 16 768/3072 -> 1024/4096 12 -> 24"
    assert memory.startswith("450m 1.8 GB 0 B 1.8 GB 3.6 GB ")
    # 14,306 updates of 1024 x 2048 tokens; the two stages together are 0.438 of 9.08e20.
    assert cost == "450m 14,306 30B 9.08e19 3.98e20 0.438"
    assert rows["total"] == ["total 185,918 390B 8.84e20"]


def test_longer_heads_show_with_their_number(command: Command) -> None:
    assert "16 x 64 -> 16 x 80" in local_rows(command("plan", *PUBLISHED).out)["900m"][1]


def test_a_recipe_is_planned_without_the_data_that_its_user_gives(command: Command) -> None:
    assert command("plan", "recipes=tokenformer-1.5b-pile").status == 0


def test_a_recipe_may_leave_its_data_and_tokenizer_to_the_environment(
    command: Command, tmp_path: Path
) -> None:
    recipe = """# @package _global_
defaults: [override /model: tiny, override /data: megatron, override /tokenizer: file]
data: {prefix: "${tokengrow.missing:}"}
tokenizer: {file: "${oc.env:NO_SUCH_VARIABLE}"}
stages: {only: {steps: 3}}
"""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(recipe)
    outcome = command("plan", "--config-dir", str(tmp_path), "recipes=mine")
    assert (outcome.status, outcome.err) == (0, "")


def test_the_first_stage_of_a_run_from_a_checkpoint_shows_its_growth(
    command: Command, source: Path
) -> None:
    words = (f"source={source}", "model.layers=3", "+stages.only.steps=2", "batch_size=16")
    assert local_rows(command("plan", *words).out)["only"][1] == "only 2 -> 3"


def test_no_model_is_built(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenformer.TokenFormer, "__init__", None)  # would fail if it were called
    outcome = command("plan", "model=1.5b", "+stages.only.steps=10")
    assert outcome.status == 0
    assert local_rows(outcome.out)["only"]


def test_a_budget_of_tokens_is_shown_in_steps(command: Command) -> None:
    words = ("recipes=quickstart", "stages.small.steps=null", "stages.small.tokens=1e6")
    cost = local_rows(command("plan", *words).out)["small"][-1].split()
    assert "489" in cost  # 1e6 / (16 sequences of 128 tokens) = 488.3


def test_a_stage_that_may_end_before_is_named(command: Command) -> None:
    words = ("model=tiny", "optim.schedule=constant", "+stages.small.steps=300")
    said = "Maximum: small may end earlier at a plateau."
    assert said in command("plan", *words, "+stages.small.plateau={}").out
    assert "Maximum:" not in command("plan", *words).out


# One growth, one model


def test_a_growth_that_cannot_be_is_not_planned(command: Command, source: Path) -> None:
    outcome = command("plan", f"source={source}", "growth=gram", "model.tokens.ffn=20")
    assert outcome.status == 2
    assert "It must append at least 16 tokens, the rank of the old keys." in outcome.err


def test_a_growth_is_shown_before_and_after(command: Command, source: Path) -> None:
    outcome = command("plan", f"source={source}", "model.tokens.ffn=64")
    rows = local_rows(outcome.out)
    config = load_checkpoint(source).config
    assert f"{config.num_parameters():,}" in rows["source"][0]
    # 48 more tokens with a key of 32 and a value of 32 in each of 2 layers.
    assert f"{config.num_parameters() + 2 * 48 * 64:,}" in rows["grown"][0]
    assert rows["grown"][1] == "grown 8/16 -> 8/64"
    assert "total" not in rows


def test_a_growth_to_a_preset_is_refused_where_the_axes_differ(
    command: Command, source: Path
) -> None:
    outcome = command("plan", f"source={source}", "model=150m")
    assert outcome.status == 2
    assert "Growth changes only width, heads, tokens, depth." in outcome.err


def test_one_model_needs_no_source(command: Command) -> None:
    rows = local_rows(command("plan", "model=150m").out)
    assert rows["model"][1].startswith("model 151,881,216 1.02B 3.07e20 ")


def test_the_memory_is_that_of_the_precision(command: Command) -> None:
    said = command("plan", "model=150m", "fabric.precision=bf16-mixed", "micro_batch_size=4").out
    assert "Memory of a training step (bf16-mixed, micro-batch 4)" in said
    # Weights and gradients 4 bytes each, copies 2, moments 8.
    assert local_rows(said)["model"][-1].startswith("model 607.5 MB 303.8 MB 607.5 MB 1.2 GB ")


# Time


def test_hours_at_a_given_speed(command: Command) -> None:
    rows = local_rows(command("plan", *PUBLISHED, "flops_per_second=4e14").out)
    assert rows["150m"][-1].endswith(" 4.00e14 213")  # 3.0725e20 / 4e14 / 3600
    assert rows["total"][0].endswith(" 614")  # 8.8407e20 / 4e14 / 3600


def test_a_growth_has_no_hours(command: Command, source: Path) -> None:
    outcome = command("plan", f"source={source}", "model.layers=3", "flops_per_second=4e14")
    assert outcome.status == 0
    assert "hours" not in outcome.out


LADDER = (
    "model=tiny",
    "model.layers=1",
    "fabric=cpu",
    "batch_size=4",
    "micro_batch_size=4",
    "+stages.small.steps=300",
    "+stages.large={steps: 220, model: {tokens: {ffn: 512}}}",
)


def test_a_measured_speed_names_the_device(command: Command) -> None:
    outcome = command("plan", *LADDER, "flops_per_second=measured")
    assert (outcome.status, outcome.err) == (0, "")
    assert "Training, from a few measured steps on CPU (" in outcome.out


def test_hours_are_those_of_the_speeds_that_were_measured(command: Command) -> None:
    found = in_json(command, *LADDER, "flops_per_second=measured")
    assert found["device"].startswith("CPU (")
    hours = 0.0
    for stage in (rung["stage"] for rung in found["rungs"]):
        assert stage["hours"] == stage["flops"] / stage["flops_per_second"] / 3600
        hours += stage["hours"]
    assert found["total"]["hours"] == pytest.approx(hours)


@pytest.mark.parametrize(
    ("speed", "value"),
    [
        ("fast", "fast"),
        ("0", "0"),
        ("-4e14", "-400000000000000.0"),
        ("inf", "inf"),
        ("nan", "nan"),
        ("true", "True"),
    ],
)
def test_an_invalid_speed_is_refused(command: Command, speed: str, value: str) -> None:
    outcome = command("plan", "recipes=quickstart", f"flops_per_second={speed}")
    assert outcome.status == 2
    assert outcome.err == (
        "tokengrow plan: flops_per_second must be a number above 0 (FLOP/s) or measured, got "
        f"{value}. Write for example 4e14.\n"
    )


def test_what_does_not_fit_while_it_is_measured_is_one_sentence(command: Command) -> None:
    micro = 2**41
    more = (f"batch_size={micro}", f"micro_batch_size={micro}", "flops_per_second=measured")
    outcome = command("plan", *LADDER, *more)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("tokengrow plan: stage small does not fit into the memory of CPU")
    assert len(outcome.err.splitlines()) == 1


# JSON


def test_json_is_the_budget_and_nothing_else(
    command: Command, composed: Callable[..., dict[str, Any]]
) -> None:
    budget = run_budget(resolve_train(composed("train", *PUBLISHED)))
    assert in_json(command, *PUBLISHED) == json.loads(json.dumps(budget.to_dict()))


def test_the_documented_keys_of_json_are_the_printed_ones(command: Command) -> None:
    text = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    section = text.partition("## JSON")[2]
    documented = {line.split("`")[1] for line in section.splitlines() if line.startswith("| `")}
    printed = set(dotted(in_json(command, *PUBLISHED)))
    assert documented == printed


def dotted(node: Any, where: str = "") -> set[str]:
    """The keys of nested objects; `[]` stands for the items of a list, and what an axis is made
    of is left out."""
    if isinstance(node, list):
        return set().union(*(dotted(item, f"{where}[]") for item in node))
    if not isinstance(node, dict) or where.endswith((".before", ".after")):
        return {where}
    return set().union(*(dotted(value, f"{where}.{key}".strip(".")) for key, value in node.items()))


def test_json_may_stand_in_front(command: Command, source: Path) -> None:
    outcome = command("plan", "--json", f"source={source}", "model.layers=3")
    assert [rung["name"] for rung in json.loads(outcome.out)["rungs"]] == ["source", "grown"]


def test_the_program_prints_json_on_stdout_alone(
    program: Callable[..., Any], tmp_path: Path
) -> None:
    outcome = program("plan", "--json", *LADDER, "flops_per_second=measured")
    assert outcome.status == 0
    assert json.loads(outcome.out)["total"]["steps"] == 520
    assert outcome.err == ""


def test_an_error_with_json_is_one_sentence_on_stderr(command: Command) -> None:
    outcome = command("plan", "--json", "recipes=quickstart", "seed=-1")
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err == "tokengrow plan: seed must be in [0, 2**63), got -1.\n"


def test_json_is_of_plan_alone(command: Command) -> None:
    outcome = command("generate", "source=x", "--json")
    assert outcome.status == 2
    assert outcome.err.startswith("tokengrow generate: Unknown key json")


# 80 columns


@pytest.mark.parametrize(
    "words",
    [("recipes=quickstart",), ("recipes=ladder-tiny",), PUBLISHED, ("recipes=ladder-paper",)],
)
def test_it_fits_80_columns(
    command: Command, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = command("plan", *words, "fabric.precision=bf16-mixed", "flops_per_second=4e14").out
    assert max(map(len, said.splitlines())) <= 80
    assert "…" not in said


def test_tokens_that_differ_in_every_role_fit_80_columns(
    tiny_model: Callable[..., ModelConfig],
) -> None:
    before = ParameterTokens(query=1001, key=1002, value=1003, output=1004, ffn=4001)
    after = ParameterTokens(query=2001, key=2002, value=2003, output=2004, ffn=8001)
    source = tiny_model(tokens=before, width=1024, heads=16)
    target = tiny_model(tokens=after, width=1536, heads=16, layers=12)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*tables(growth_budget(plan_growth(source, target), 4, "32-true")))
    said = console.export_text()
    assert "…" not in said
    assert "1001/1002/1003/1004/4001 ->" in said
    assert "2001/2002/2003/2004/8001" in said


def test_the_precision_of_auto_is_the_machines(command: Command) -> None:
    expected = FabricConfig().chosen_precision
    assert f"({expected}, micro-batch" in command("plan", "model=150m", "fabric=auto").out
