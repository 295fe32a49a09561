"""Tests that the tables and figures of docs/growing.md agree with the growth engine."""

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokengrow.growth.tensors import pattention_name

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "growing.md").read_text()
SCRIPT = DOCS / "figures" / "growth.py"
AXES = ("tokens", "width", "heads", "depth")
CELL_KINDS = {  # start of a cell of a table to the kind of its entries
    "unchanged": "UNCHANGED",
    "×": "SCALED",
    "a copy": "MOVED",
    "the mean": "MEAN",
    "random": "RANDOM",
    "N(0": "RANDOM",
    "zero": "ZERO",
    "one": "ONE",
}


@pytest.fixture(scope="module")
def figures() -> Iterator[Any]:
    """Figure script, imported as a module."""
    spec = spec_from_file_location("growth_figures", SCRIPT)
    assert spec and spec.loader
    module = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses need it there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def table(axis: str) -> list[list[str]]:
    """Return the cells of the table of an axis, without header and config keys."""
    section = PAGE.split(f"\n## {axis.capitalize()}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [row for row in rows[2:] if "_eps`" not in row[0]]


def tensors_of_row(label: str, names: set[str]) -> set[str]:
    """Return the tensors that the first cell of a row describes."""
    if "everything else" in label:
        return names
    tensors = {"embedding.weight"} if "embedding" in label else set()
    tensors |= {f"final_norm.{part}" for part in ("weight", "bias") if f"norm's {part}" in label}
    for part, roles in re.findall(r"(keys|values) of ((?:`\w+`(?:, | and )?)+)", label):
        for role in re.findall(r"\w+", roles.replace(" and ", " ")):
            tensors |= {n for n in names if n.endswith(pattention_name(0, role, part[:-1])[9:])}
    if part := re.match(r"`(key|value)_param_tokens`", label):
        tensors |= {n for n in names if n.endswith(part[0].strip("`"))}
    assert tensors, label
    return tensors


def regions(axis: str, old: tuple[int, ...], kinds: Any) -> list[Any]:
    """Return the regions of a tensor that the columns of an axis' table describe."""
    if axis == "tokens":
        return [kinds[: old[0]], kinds[old[0] :]]
    if axis == "width":
        return [kinds[:, : old[1]], kinds[:, old[1] :]]
    heads, length = old[1:]
    return [kinds[:, :heads, :length], kinds[:, :heads, length:], kinds[:, heads:]]


def documented_kind(figures: Any, cell: str) -> Any:
    """Return the kind of entries that a cell of a table describes."""
    (kind,) = (kind for begin, kind in CELL_KINDS.items() if cell.startswith(begin))
    return figures.Kind[kind]


@pytest.mark.parametrize("axis", ["tokens", "width", "heads"])
def test_growth_agrees_with_table_of_axis(figures: Any, axis: str) -> None:
    found = figures.compared(figures.random_model(figures.SOURCE), figures.TARGETS[axis])
    rest = set(found)
    for label, *cells in table(axis):
        for name in tensors_of_row(label, set(found)):
            tensor = found[name]
            pieces = regions(axis, tensor.old, tensor.kinds)
            for cell, piece in zip(cells, pieces, strict=True):
                assert piece.size and set(piece.flat) == {documented_kind(figures, cell)}, (
                    name,
                    cell,
                )
            rest.discard(name)
    assert all(found[name].is_all(figures.Kind.UNCHANGED) for name in rest), "not in the table"


def test_depth_growth_agrees_with_table(figures: Any) -> None:
    source, target = figures.random_model(figures.SOURCE), figures.TARGETS["depth"]
    found = figures.compared(source, target)
    blocks = {name for name in found if name.startswith("blocks.")}
    kinds = {}
    for label, *cells in reversed(table("depth")):  # "everything else" first
        documented = tuple(documented_kind(figures, cell) for cell in cells)
        kinds |= {name: documented for name in tensors_of_row(label, blocks)}
    assert set(kinds) == blocks
    stems = [
        "0",
        "0",
        "1",
        "1",
        "2",
    ]  # 3 blocks to 5: a new one after the first and after the second
    for name, (old, new) in kinds.items():
        layer = int(name.split(".")[1])
        assert found[name].stem.split(".")[1] == stems[layer]
        assert found[name].is_all(new if layer in (1, 3) else old), name
    assert all(found[name].is_all(figures.Kind.UNCHANGED) for name in set(found) - blocks)


@pytest.mark.parametrize("activation", ["gelu_l2_norm", "l2_norm_gelu"])
def test_width_growth_scales_old_keys_unless_input_is_normed(figures: Any, activation: str) -> None:
    source = replace(figures.SOURCE, activation=activation)
    target = replace(figures.TARGETS["width"], activation=activation)
    found = figures.compared(figures.random_model(source), target)
    reader = found[pattention_name(1, "ffn", "key")]
    scaled = activation == "gelu_l2_norm"
    assert set(reader.kinds[:, :12].flat) == {figures.Kind["SCALED" if scaled else "UNCHANGED"]}
    assert reader.factor == pytest.approx(math.sqrt(12 / 18) if scaled else 1, rel=1e-12)


def test_factors_are_computed_and_formatted(figures: Any) -> None:
    model = figures.random_model(figures.SOURCE)
    query = figures.compared(model, figures.TARGETS["heads"])[pattention_name(0, "query", "value")]
    norm = figures.compared(model, figures.TARGETS["width"])["final_norm.weight"]
    assert figures.formula(query.factor) == "√(C′/C) = 1.225"  # C: 4 to 6
    assert figures.formula(norm.factor) == "√(D/D′) = 0.816"  # D: 12 to 18
    assert figures.formula(3.0) == "3.000"


def test_entries_are_classified_individually(figures: Any) -> None:
    old = np.array([[3.0, 5.0], [7.0, -4.0]])
    new = np.array([[3.0, 9.0, 4.0, 0.0], [7.0, -4.0, 1.5, 1.0], [4.0, 1.5, 0.0, 2.0]])
    assert [[str(kind) for kind in row] for row in figures.compare(old, new).kinds] == [
        ["unchanged", "random", "mean of its row", "zero"],  # 5 was replaced by 9
        ["unchanged", "unchanged", "mean of its row", "one"],
        ["random", "random", "zero", "random"],  # 4 and 1.5: means of other rows
    ]


def test_page_shows_every_figure_of_script(figures: Any, tmp_path: Path) -> None:
    shown = {DOCS / target for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PAGE)}
    drawn = {path.name for path in figures.draw(tmp_path)}
    assert drawn == {f"growth-{axis}.png" for axis in AXES}
    assert shown == {SCRIPT.parent / name for name in drawn | {"growth-loss.png"}}
    for path in [*shown, *tmp_path.iterdir()]:
        assert path.read_bytes().startswith(b"\x89PNG"), path
        assert path.stat().st_size < 100_000, path
