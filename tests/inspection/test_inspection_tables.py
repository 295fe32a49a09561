"""Tables of an inspection: content, and width of at most 80 columns."""

from dataclasses import replace
from io import StringIO

import torch
from rich.console import Console
from rich.table import Table

from tokengrow.checkpoint.store import Checkpoint
from tokengrow.inspection.analysis import Inspection, inspect_checkpoint
from tokengrow.inspection.tables import (
    DEFINITIONS,
    format_percent,
    history_table,
    inspection_tables,
)
from tokengrow.model.config import ModelConfig


def print_lines(table: Table, width: int = 80) -> list[str]:
    """Return the printed lines of a table."""
    console = Console(width=width, record=True, file=StringIO())
    console.print(table)
    return console.export_text().splitlines()


def table_words(inspection: Inspection, title: str) -> list[list[str]]:
    """Return the words of each printed line of the table whose title starts with `title`."""
    (table,) = [
        table for table in inspection_tables(inspection) if str(table.title).startswith(title)
    ]
    return [line.split() for line in print_lines(table, 200) if line.strip()]


def test_tables_of_large_model_fit_80_columns(
    checkpoints: list[Checkpoint], grown: Inspection
) -> None:
    # Widest values: size 1.5b, grown along all axes, after 100,000 updates.
    large = ModelConfig.preset("1.5b")
    lineage = [
        replace(
            entry,
            source=replace(entry.source, step=123_456, parameters=1_234_567_890),
            target=replace(entry.target, parameters=12_345_678_901),
        )
        for entry in grown.checkpoint.lineage
    ]
    checkpoint = replace(grown.checkpoint, config=large, lineage=tuple(lineage))
    generations = [
        replace(each, tokens=368_640, updates=123_456, axes=["width", "tokens", "depth"])
        for each in grown.generations
    ]
    inspection = replace(grown, checkpoint=checkpoint, generations=generations)
    without_text = replace(inspection, text_tokens=0)
    for table in [
        *inspection_tables(inspection),
        history_table([inspection]),
        *inspection_tables(without_text),
    ]:
        lines = print_lines(table, 80)
        assert max(map(len, lines)) <= 80
        assert not any("…" in line for line in lines), lines


def test_definitions_fit_80_columns() -> None:
    assert max(map(len, DEFINITIONS)) <= 80


def test_percentages_have_three_decimals() -> None:
    shares = (1.0, 0.999999, 0.06, 0.00259, 0.00001, 0.000009, 0.0, None)
    assert [format_percent(share) for share in shares] == [
        "100", "99.999", "6.000", "0.259", "0.001", "<0.001", "0", "-",
    ]  # fmt: skip


def test_caption_defines_sizes_of_parameter_tokens(grown: Inspection) -> None:
    printed = " ".join(word for line in table_words(grown, "Parameters by role") for word in line)
    assert "N: parameter tokens of a layer." in printed and "tau: scale after the norm." in printed


def test_lineage_has_row_per_axis_and_joins_equal_changes(grown: Inspection) -> None:
    *_, initial, tokens, ffn, depth = table_words(grown, "Lineage")
    assert initial[:2] == ["0", "initial"]
    assert tokens[:6] == ["1", "tokens", "attention", "8", "->", "12"]
    assert tokens[6:8] == ["20", f"{grown.checkpoint.config.num_parameters():,}"]
    assert ffn == ["ffn", "16", "->", "20"]
    assert depth == ["depth", "layers", "2", "->", "3"]


def test_contribution_table_has_row_per_generation(grown: Inspection) -> None:
    title = "Contribution by generation in %, on 64 tokens of text"
    *_, initial, growth = table_words(grown, title)
    assert initial[:2] == ["initial", "96"], "2 layers of 4 x 8 + 16"
    assert growth[:3] == ["growth", "1", "108"], "2 x (4 x 4 + 4) + 4 x 12 + 20"
    assert growth[3] == "0", "updates"
    assert growth[-2:] == ["0", "0"], "output and ffn"
    assert initial[-2:] == ["100", "100"]


def test_model_of_one_generation_has_no_growth_tables(
    checkpoints: list[Checkpoint], text: torch.Tensor
) -> None:
    inspection = inspect_checkpoint(checkpoints[0], text)
    titles = [str(table.title) for table in inspection_tables(inspection)]
    assert not any("added by a growth" in title or title == "Lineage" for title in titles)
    assert any(title.startswith("Effective number") for title in titles)


def test_table_of_grown_model_shows_share_added_by_growth(grown: Inspection) -> None:
    titles = [str(table.title) for table in inspection_tables(grown)]
    assert "Contribution of tokens added by a growth, in %" in titles


def test_lengths_are_shown_without_text(checkpoints: list[Checkpoint]) -> None:
    inspection = inspect_checkpoint(checkpoints[1])
    *_, keys, _values = table_words(inspection, "Length of keys and values")
    assert keys[:4] == ["growth", "1", "108", "keys"]
    layer = next(each for each in inspection.layers if (each.layer, each.role) == (1, "ffn"))
    # New keys are not zero only in the new one of three layers: 20 of 28 in the FFN.
    expected = layer.key_norm[1] * (20 / 28) ** 0.5
    assert keys[-1] == f"{expected:.3g}"


def test_history_has_row_per_checkpoint_and_dashes(
    checkpoints: list[Checkpoint], text: torch.Tensor
) -> None:
    inspections = [inspect_checkpoint(checkpoint, text) for checkpoint in checkpoints]
    lines = print_lines(history_table(inspections))
    *_, before, after = [line.split() for line in lines if line.strip()]
    assert before == ["20", "100", "-", f"{100 * inspections[0].dead_tokens()[0] / 96:.1f}%"]
    assert after[0] == "20"
    roles = inspections[1].shares().values()
    assert after[2] == f"{100 * sum(share[1] for share in roles) / 5:.3f}"
