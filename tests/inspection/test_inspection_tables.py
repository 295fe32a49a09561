"""The tables and the plots of an inspection."""

import struct
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tokengrow.checkpoint.schema import TrainState
from tokengrow.checkpoint.store import Checkpoint
from tokengrow.growth.checkpoint import grow_checkpoint
from tokengrow.growth.plan import plan_growth
from tokengrow.inspection.analysis import Inspection, inspect_checkpoint
from tokengrow.inspection.plots import plot_history, plot_tokens
from tokengrow.inspection.tables import (
    DEFINITIONS,
    format_percent,
    history_table,
    inspection_tables,
)
from tokengrow.model.config import ModelConfig, Tokens
from tokengrow.model.tokenformer import TokenFormer

TEXT = torch.randint(512, (2, 32), generator=torch.Generator().manual_seed(3))


def printed(shown: Any, width: int = 80) -> list[str]:
    console = Console(width=width, record=True, file=StringIO())
    console.print(shown)
    return console.export_text().splitlines()


def words(inspection: Inspection, title: str) -> list[list[str]]:
    """The lines of the table of this title, cut at the spaces."""
    (shown,) = [each for each in inspection_tables(inspection) if str(each.title).startswith(title)]
    return [line.split() for line in printed(shown, 200) if line.strip()]


@pytest.fixture(scope="module")
def sources(tiny_model: Callable[..., ModelConfig]) -> list[Checkpoint]:
    """A model with published initial weights at step 20, and grown along two axes at once."""
    model = TokenFormer(tiny_model(8, init="published"))
    model.init_weights(torch.Generator().manual_seed(0))
    born = replace(Checkpoint.of(model), train_state=TrainState("tokens", step=20))
    wanted = replace(
        born.config, layers=3, tokens=Tokens(query=12, key=12, value=12, output=12, ffn=20)
    )
    return [born, grow_checkpoint(born, plan_growth(born.config, wanted))]


@pytest.fixture(scope="module")
def grown(sources: list[Checkpoint]) -> Inspection:
    return inspect_checkpoint(sources[1], TEXT)


def test_every_table_of_a_large_model_fits_80_columns(
    sources: list[Checkpoint], grown: Inspection
) -> None:
    # As wide as it gets: of 1.5b, grown along all axes, after 100,000 updates.
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
    found = replace(grown, checkpoint=checkpoint, generations=generations)
    for shown in [
        *inspection_tables(found),
        history_table([found]),
        *inspection_tables(replace(found, text_tokens=0)),
    ]:
        lines = printed(shown, 80)
        assert max(map(len, lines)) <= 80
        assert not any("…" in line for line in lines), lines


def test_the_lines_below_fit_too() -> None:
    assert max(map(len, DEFINITIONS)) <= 80


def test_a_share_has_the_same_decimals_whatever_its_size() -> None:
    shares = (1.0, 0.999999, 0.06, 0.00259, 0.00001, 0.000009, 0.0, None)
    assert [format_percent(share) for share in shares] == [
        "100", "99.999", "6.000", "0.259", "0.001", "<0.001", "0", "-",
    ]  # fmt: skip


def test_the_columns_of_sizes_are_explained_where_there_are_tokens(grown: Inspection) -> None:
    said = " ".join(word for line in words(grown, "Parameters by role") for word in line)
    assert "N: parameter tokens of a layer." in said and "tau: scale after the norm." in said


def test_the_lineage_is_a_row_per_axis_with_equal_changes_in_one_line(grown: Inspection) -> None:
    *_, birth, tokens, ffn, depth = words(grown, "Lineage")
    assert birth[:2] == ["0", "birth"]
    assert tokens[:6] == ["1", "tokens", "attention", "8", "->", "12"]
    assert tokens[6:8] == ["20", f"{grown.checkpoint.config.num_parameters():,}"]
    assert ffn == ["ffn", "16", "->", "20"]
    assert depth == ["depth", "layers", "2", "->", "3"]


def test_a_row_says_what_the_tokens_of_a_growth_do(grown: Inspection) -> None:
    *_, birth, growth = words(grown, "Contribution by generation in %, on 64 tokens of text")
    assert birth[:2] == ["birth", "96"], "2 layers of 4 x 8 + 16"
    assert growth[:3] == ["growth", "1", "108"], "2 x (4 x 4 + 4) + 4 x 12 + 20"
    assert growth[3] == "0", "updates"
    assert growth[-2:] == ["0", "0"], "of output and ffn"
    assert birth[-2:] == ["100", "100"]


def test_a_model_of_one_generation_has_no_table_of_what_a_growth_brought(
    sources: list[Checkpoint],
) -> None:
    titles = [str(each.title) for each in inspection_tables(inspect_checkpoint(sources[0], TEXT))]
    assert not any("growth brought" in title or title == "Lineage" for title in titles)
    assert any(title.startswith("Effective number") for title in titles)


def test_without_text_lengths_are_shown_instead(sources: list[Checkpoint]) -> None:
    found = inspect_checkpoint(sources[1])
    rows = words(found, "Length of keys and values")
    of_growth = rows[-2:]
    assert of_growth[0][:4] == ["growth", "1", "108", "keys"]
    layer = next(each for each in found.layers if (each.layer, each.role) == (1, "ffn"))
    # Of three layers only the new one has new keys that are not zero: 20 of 28 in the FFN.
    expected = layer.key_norm[1] * (20 / 28) ** 0.5
    assert of_growth[0][-1] == f"{expected:.3g}"


def test_a_history_has_a_row_per_checkpoint_and_dashes_before_a_growth(
    sources: list[Checkpoint],
) -> None:
    past = [inspect_checkpoint(source, TEXT) for source in sources]
    *_, before, after = [line.split() for line in printed(history_table(past)) if line.strip()]
    assert before == ["20", "100", "-", f"{100 * past[0].dead_tokens()[0] / 96:.1f}%"]
    assert after[0] == "20"
    roles = past[1].shares().values()
    assert after[2] == f"{100 * sum(share[1] for share in roles) / 5:.3f}"


@pytest.mark.parametrize(
    "draw",
    [lambda found, path: plot_tokens(found, path), lambda found, path: plot_history([found], path)],
    ids=["tokens", "history"],
)
def test_a_plot_shows_what_tokens_do(
    draw: Callable[[Inspection, Path], Path], grown: Inspection, tmp_path: Path
) -> None:
    plot = draw(grown, tmp_path / "plot.png").read_bytes()
    assert plot[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", plot[16:24])[0] == 1650  # 11 inches at 150 dpi
    layers = [
        replace(
            each,
            activity=each.activity and replace(each.activity, contribution=[1.0, 2.0], dead=[1, 2]),
        )
        for each in grown.layers
    ]
    other = draw(replace(grown, layers=layers), tmp_path / "other.png").read_bytes()
    assert other != plot


def test_more_tokens_than_columns_are_drawn_too(grown: Inspection, tmp_path: Path) -> None:
    many = {at: each.contribution.repeat(100) for at, each in grown.activity.items()}
    activity = {at: replace(each, contribution=many[at]) for at, each in grown.activity.items()}
    layers = [replace(each, tokens=[100 * count for count in each.tokens]) for each in grown.layers]
    found = replace(grown, activity=activity, layers=layers)
    assert plot_tokens(found, tmp_path / "many.png").stat().st_size > 20_000
