"""Figures of the effect of a growth on the tensors of a model, one for each axis.

    python docs/figures/growth.py

The script grows a small random model along one axis and compares every entry of the grown model
with the source, so the figures show measured results. It writes the figures of `docs/growing.md`
to its own directory. `tests/package/test_figures.py` compares them with the tables of that page.

Shapes: `N` parameter tokens, `D` width, `H` heads, `C` head dim, `L` layers, `V` vocabulary before
a growth; a prime marks the sizes after it.
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from tokengrow import ModelConfig, TokenFormer, grow
from tokengrow.growth.tensors import block_names, pattention_name
from tokengrow.model.config import ROLES, ParameterTokens

HERE = Path(__file__).parent
CLOSE = 1e-12
"""Relative tolerance of comparisons; the models are in float64."""


class Kind(StrEnum):
    """Effect of a growth on an entry."""

    UNCHANGED = "unchanged"
    SCALED = "multiplied by a constant"
    MOVED = "copied and perturbed"
    MEAN = "mean of its row"
    RANDOM = "random"
    ZERO = "zero"
    ONE = "one"


SOURCE = ModelConfig(
    vocab_size=5,
    context_length=8,
    layers=3,
    width=12,
    heads=2,
    head_dim=4,
    tokens=ParameterTokens(query=5, key=5, value=5, output=5, ffn=7),
)
TARGETS = {
    "tokens": replace(SOURCE, tokens=ParameterTokens(query=8, key=8, value=8, output=8, ffn=11)),
    "width": replace(SOURCE, width=18),
    "heads": replace(SOURCE, heads=3, head_dim=6),
    "depth": replace(SOURCE, layers=5),
}
"""Growth axis to the target of the growth of `SOURCE`."""


@dataclass(frozen=True)
class Found:
    """A tensor of the grown model, compared with its source tensor."""

    values: NDArray[np.float64]
    """[rows, channels], or [rows, H', C'] for the channels of heads."""
    kinds: NDArray[Any]
    """`Kind` of each entry."""
    factor: float
    """Factor of the `SCALED` entries; 1 without any."""
    old: tuple[int, ...]
    """Shape of the source tensor, which fills the first corner of the grown one."""
    stem: str = ""
    """Name of the source tensor."""

    def is_all(self, kind: Kind) -> bool:
        """Return whether every entry is of this kind."""
        return bool((self.kinds == kind).all())


def random_model(config: ModelConfig) -> TokenFormer:
    """Return a float64 model of normal numbers, so that no entry is zero or one by chance."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
        for name, tensor in TokenFormer(config).state_dict().items()
    }
    return TokenFormer.from_weights(config, weights)


def compare(old: NDArray[np.float64], new: NDArray[np.float64]) -> Found:
    """Return the kind of every entry of `new`; `old` is compared with its first corner."""
    corner = tuple(slice(length) for length in old.shape)
    before = np.full(new.shape, np.nan)
    before[corner] = old
    mean = np.full((len(new), 1), np.nan)
    mean[: len(old), 0] = old.reshape(len(old), -1).mean(axis=1)
    mean = mean.reshape(-1, *[1] * (new.ndim - 1))

    kinds = np.full(new.shape, Kind.RANDOM, dtype=object)
    kinds[np.isclose(new, mean, rtol=CLOSE, atol=0)] = Kind.MEAN
    kinds[new == 1] = Kind.ONE
    kinds[new == 0] = Kind.ZERO
    kinds[new == before] = Kind.UNCHANGED
    factor, rest = 1.0, (kinds == Kind.RANDOM) & ~np.isnan(before)
    if rest.sum() > 1:
        ratios = new[rest] / before[rest]
        if np.allclose(ratios, ratios[0], rtol=CLOSE, atol=0):
            factor = float(ratios[0])
            kinds[rest] = Kind.SCALED
        elif _rms(new[rest] - before[rest]) < 0.5 * _rms(before[rest]):
            kinds[rest] = Kind.MOVED
    return Found(new, kinds, factor, old.shape)


def compared(source: TokenFormer, target: ModelConfig) -> dict[str, Found]:
    """Grow `source` and compare each tensor of the result, by name, with its source tensor."""
    grown = grow(source, target).model
    before, after = source.to_weights(), grown.to_weights()
    stems = {name: name for name in before}
    for layer, block in enumerate(origins(source, grown)):
        stems |= dict(zip(block_names(layer), block_names(block), strict=True))
    found = {}
    for name, stem in stems.items():
        old = _by_heads(before[stem].numpy(), stem, source.config)
        new = _by_heads(after[name].numpy(), name, target)
        found[name] = replace(compare(old, new), stem=stem)
    return found


def origins(source: TokenFormer, grown: TokenFormer) -> list[int]:
    """Return, for each block of the grown model, the old block with the nearest query keys."""

    def keys(model: TokenFormer, layer: int) -> NDArray[np.float64]:
        n, width = source.config.tokens.query, source.config.width
        weights = model.to_weights()[pattention_name(layer, "query", "key")].numpy()
        return np.asarray(weights[:n, :width])

    old = [keys(source, layer) for layer in range(source.config.layers)]
    new = [keys(grown, layer) for layer in range(grown.config.layers)]
    return [int(np.argmin([_rms(block - each) for each in old])) for block in new]


def _by_heads(values: NDArray[np.float64], name: str, config: ModelConfig) -> NDArray[np.float64]:
    """Reshape [.., H C] to [.., H, C] for channels of heads, and a vector to one row."""
    if name.endswith(("attention.output.key_param_tokens", *_INNER_VALUES)):
        return values.reshape(len(values), config.heads, config.head_dim)
    return values.reshape(-1, values.shape[-1])


_INNER_VALUES = [f"attention.{role}.value_param_tokens" for role in ("query", "key", "value")]


def _rms(values: NDArray[np.float64]) -> float:
    return math.sqrt(np.square(values).mean())


# Drawing: one cell of a tensor is one unit.

COLOURS = {  # the palette of Okabe and Ito, which does not rely on red and green
    Kind.UNCHANGED: "#0072b2",
    Kind.SCALED: "#cc79a7",
    Kind.MOVED: "#56b4e9",
    Kind.MEAN: "#e69f00",
    Kind.RANDOM: "#009e73",
    Kind.ZERO: "#ffffff",
    Kind.ONE: "#ffffff",
}
SIGNS = {Kind.ZERO: "0", Kind.ONE: "1"}
LINE, TEXT = "#bbbbbb", "#222222"
LEFT, BOX = 13, 4.6
"""Left edge of stacked tensors and width of a block, in cells."""


class Page:
    """A figure of `width` x `height` cells, 7.2 inches wide; y points down."""

    def __init__(self, width: float, height: float) -> None:
        self.unit = 7.2 / width
        self.figure = Figure(figsize=(7.2, self.unit * height), dpi=200)
        FigureCanvasAgg(self.figure)
        self.axes: Axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.axis("off")
        self.found: list[Found] = []

    def text(self, x: float, y: float, words: str, size: float = 9, **style: Any) -> float:
        """Draw text at a position, styled as in matplotlib, and return its right edge."""
        style = {"va": "center_baseline", "color": TEXT, **style}
        box = self.axes.text(x, y, words, fontsize=size, **style).get_window_extent()
        return float(box.x1 / self.figure.dpi / self.unit)

    def tensor(self, x: float, y: float, found: Found, gap: float = 0.0) -> None:
        """Draw every entry as a cell, and a frame around each part from the source.

        Args:
            x: left edge.
            y: upper edge.
            found: the tensor.
            gap: space between two heads.
        """
        self.found.append(found)
        shape = found.values.shape
        wide = shape[-1]
        for index in np.ndindex(shape):
            left = x + index[-1] + (index[1] * (wide + gap) if len(shape) == 3 else 0)
            self.cell(left, y + index[0], found.kinds.item(index), _strength(found, index))
        for head in range(found.old[1] if len(shape) == 3 else 1):
            corner = x + head * (wide + gap), y
            self.axes.add_patch(_frame(*corner, found.old[-1], found.old[0]))

    def cell(self, x: float, y: float, kind: Kind, strength: float = 1.0) -> None:
        """Draw a square in the colour of its kind; smaller entries are paler."""
        red, green, blue = (1 - strength * (1 - part) for part in to_rgb(COLOURS[kind]))
        self.axes.add_patch(Rectangle((x, y), 1, 1, fc=(red, green, blue), ec=LINE, lw=0.5))
        if kind in SIGNS:
            self.text(x + 0.5, y + 0.5, SIGNS[kind], 26 * self.unit, ha="center", color="#777777")

    def patch(self, x: float, y: float, found: Found) -> None:
        """Draw a tensor of one kind as one rectangle centred at the height `y`."""
        self.found.append(found)
        (kind,) = set(found.kinds.flat)
        self.axes.add_patch(Rectangle((x, y - 0.8), 1.6, 1.6, fc=COLOURS[kind], ec=LINE, lw=0.5))
        self.text(x + 0.8, y, SIGNS.get(kind, ""), ha="center", color="#777777")

    def box(self, x: float, y: float, words: str, old: bool = True) -> None:
        """Draw a frame around text at the height `y`, dotted if it is not from the source."""
        frame = _frame(x, y - 0.8, BOX, 1.6)
        frame.set_linestyle("-" if old else ":")
        self.axes.add_patch(frame)
        self.text(x + BOX / 2, y, words, ha="center")

    def line(self, start: tuple[float, float], end: tuple[float, float], dashed: bool) -> None:
        """Draw a line from one point to another."""
        xs, ys = zip(start, end, strict=True)
        self.axes.plot(xs, ys, color=TEXT, linewidth=1, linestyle=":" if dashed else "-")

    def legend(self, y: float) -> None:
        """Draw the legend of the colours in use; the cells of 0 and 1 are labelled."""
        kinds = {kind for found in self.found for kind in found.kinds.flat}
        x = 1.0
        for kind in (kind for kind in COLOURS if kind in kinds and kind not in SIGNS):
            words = str(kind)
            if kind is Kind.SCALED:
                (factor,) = {found.factor for found in self.found} - {1.0}
                words = f"× {formula(factor)}"
            self.cell(x, y, kind)
            x = self.text(x + 1.4, y + 0.5, words) + 1
        self.axes.add_patch(_frame(x, y, 1, 1))
        self.text(x + 1.4, y + 0.5, "from the source")

    def save(self, path: Path) -> Path:
        """Write a PNG, 1440 pixels wide."""
        self.figure.savefig(path)
        return path


def formula(factor: float) -> str:
    """Return a constant as text, with its formula in the letters of the sizes if it has one."""
    known = {
        "√(C′/C)": math.sqrt(TARGETS["heads"].head_dim / SOURCE.head_dim),
        "√(D/D′)": math.sqrt(SOURCE.width / TARGETS["width"].width),
    }
    names = [f"{name} = " for name, value in known.items() if math.isclose(value, factor)]
    return "".join([*names, f"{factor:.3f}"])


def draw_tokens(found: dict[str, Found]) -> Page:
    """Draw keys and values of one layer side by side; a token is a row of both."""
    page = Page(36, 16)
    old, new = SOURCE.tokens.ffn, TARGETS["tokens"].tokens.ffn
    for x, part, letter in ((9, "key", "K"), (23, "value", "V")):
        page.text(x, 1.2, f"{letter}  [N, D]", 10, weight="bold")
        page.text(x + 12, 1.2, f"{part}_param_tokens", ha="right")
        page.tensor(x, 2, found[pattention_name(0, "ffn", part)])
    page.text(8, 2 + old / 2, "N parameter tokens\nof the source", ha="right")
    page.text(8, 2 + (old + new) / 2, "N′ - N new ones", ha="right")
    page.legend(14)
    return page


def draw_width(found: dict[str, Found]) -> Page:
    """Draw all kinds of tensors with channels of the residual stream, one below the other."""
    page = Page(36, 26.5)
    rows = (
        ("embedding", "[vocabulary, D]  writes", "embedding.weight"),
        ("V of output", "[N, D]  writes", pattention_name(0, "output", "value")),
        ("K of query", "[N, D]  reads", pattention_name(0, "query", "key")),
        ("final norm weight", "", "final_norm.weight"),
        ("final norm bias", "", "final_norm.bias"),
    )
    _columns(page, (("D channels of the source", 0, 12), ("D′ - D new", 12, 18)))
    _stack(page, rows, found)
    return page


def draw_heads(found: dict[str, Found]) -> Page:
    """Draw the tensors with channels of heads, one below the other, with gaps between heads."""
    page = Page(36, 28)
    rows = (
        ("V of query", "[N, H C]", pattention_name(0, "query", "value")),
        ("V of key", "[N, H C]", pattention_name(0, "key", "value")),
        ("V of value", "[N, H C]", pattention_name(0, "value", "value")),
        ("K of output", "[N, H C]", pattention_name(0, "output", "key")),
    )
    _columns(page, (("old head 0", 0, 6), ("old head 1", 7, 13), ("new head", 14, 20)))
    _stack(page, rows, found)
    return page


def draw_depth(found: dict[str, Found]) -> Page:
    """Draw the blocks before and after, with a rectangle for each of their tensors."""
    page = Page(36, 17.2)
    layers = TARGETS["depth"].layers
    middle = [4.2 + 2.2 * layer for layer in range(layers)]
    for column, role in enumerate(ROLES):
        page.text(17.2 + 4 * column, 1, role, 9.5, ha="center", weight="bold")
        page.text(16.3 + 4 * column, 2.3, "K", ha="center")
        page.text(18.1 + 4 * column, 2.3, "V", ha="center")
    page.text(3.5, 1, "L blocks", 9.5, ha="center", weight="bold")
    page.text(11.5, 1, "L′ blocks", 9.5, ha="center", weight="bold")
    for layer, height in enumerate(middle):
        tensors = [found[name] for name in block_names(layer)]
        itself = all(tensor.is_all(Kind.UNCHANGED) for tensor in tensors)
        block = int(tensors[0].stem.split(".")[1])
        before = middle[0] + (block + 0.5) * (middle[-1] - middle[0]) / SOURCE.layers
        if itself:
            page.box(1.2, before, f"block {block}")
        page.box(9.2, height, f"old block {block}" if itself else "new block", itself)
        page.line((1.2 + BOX, before), (9.2, height), dashed=not itself)
        for column, tensor in enumerate(tensors):
            page.patch(15.5 + 2 * column - 0.2 * (column % 2), height, tensor)
    page.legend(middle[-1] + 2)
    return page


def _columns(page: Page, labels: tuple[tuple[str, float, float], ...]) -> None:
    """Draw labels above ranges of columns."""
    for words, first, last in labels:
        page.text(LEFT + (first + last) / 2, 1.2, words, ha="center")


def _stack(page: Page, rows: tuple[tuple[str, str, str], ...], found: dict[str, Found]) -> None:
    """Draw tensors below one another, with names at the left and the legend below."""
    y = 2.0
    for title, shape, name in rows:
        tensor = found[name]
        middle = y + len(tensor.values) / 2
        page.text(LEFT - 1, middle - (0.6 if shape else 0), title, 9.5, ha="right", weight="bold")
        page.text(LEFT - 1, middle + 0.7, shape, ha="right")
        page.tensor(LEFT, y, tensor, gap=1)
        y += len(tensor.values) + 1
    page.legend(y + 0.5)


def _frame(x: float, y: float, width: float, height: float) -> Rectangle:
    return Rectangle((x, y), width, height, fill=False, ec=TEXT, lw=1.6, zorder=3)


def _strength(found: Found, index: tuple[int, ...]) -> float:
    """Return the colour strength of an entry: 0.4 at zero, 1 at twice the root mean square."""
    return 0.4 + 0.6 * min(1.0, abs(float(found.values[index])) / 2 / _rms(found.values))


PAGES = {"tokens": draw_tokens, "width": draw_width, "heads": draw_heads, "depth": draw_depth}
"""Growth axis to its drawing function."""


def draw(folder: Path) -> list[Path]:
    """Write the figure of every axis to a directory."""
    source = random_model(SOURCE)
    return [
        page(compared(source, TARGETS[axis])).save(folder / f"growth-{axis}.png")
        for axis, page in PAGES.items()
    ]


if __name__ == "__main__":
    for path in draw(HERE):
        print(path)
