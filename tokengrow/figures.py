"""Matplotlib figures of the plots that are written to files."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def empty_figure(width: float, height: float) -> "Figure":
    """Return a figure with its own canvas.

    Args:
        width: width, inches.
        height: height, inches.
    """
    # Imported here because it takes half a second. The object interface does not change the state
    # or the backend of the user's pyplot.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
