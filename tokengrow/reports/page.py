"""The page of a report: one HTML file that needs no other, nor a network."""

import base64
import re
from collections.abc import Mapping
from datetime import datetime
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from tokengrow.console.format import format_count, format_power, format_small_number
from tokengrow.evaluation.scores import format_value_and_error, metric_label
from tokengrow.reports.plots import Png, style

TEMPLATE = "report.html.jinja"

CAPTIONS = {
    "loss-vs-flops": (
        "Loss against compute",
        "FLOPs are cumulative: all stages, and what lies behind the checkpoint that a run started "
        "from. On a logarithmic axis the same distance is the same ratio everywhere.",
    ),
    "loss-vs-flops-end": (
        "The end of it",
        "The same, from a third of the smallest total on.",
    ),
    "loss-vs-tokens": ("Loss against tokens", "Tokens trained on, cumulative likewise."),
    "loss-vs-time": (
        "Loss against wall time",
        "Seconds of training with its growths and validations, without the making of the data and "
        "without what a kill lost.",
    ),
    "cost": (
        "What each run has cost",
        "A part for each size, the later the darker; grey is what lies behind the source. The "
        "black mark is reckoned, not measured: the last size alone, on as many tokens. The loss "
        "is the lowest one.",
    ),
}
"""Figure to (its heading, what one has to know)."""


def page(report: Mapping[str, Any], figures: Mapping[str, Png]) -> str:
    """The report as HTML.

    Args:
        report: of `tokengrow.reports.report.Report.values`.
        figures: name to PNG, in their order.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "power": _or_dash(format_power),
        "count": _or_dash(format_count),
        "whole": _or_dash("{:,}".format),
        "loss": _or_dash("{:.4f}".format),
        "drift": _or_dash(format_small_number),
        "duration": _or_dash(duration),
        "metric": metric_label,
        "times": lambda ratio: "not reached" if ratio is None else f"{ratio:.2f} ×",
        "breaks": breaks,
        "data": lambda png: base64.b64encode(png).decode(),
    }
    text = (files("tokengrow.evaluation") / TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(text).render(
        **report,
        figures=[(name, *CAPTIONS[name], png) for name, png in figures.items()],
        styles=[style(number) for number in range(len(report["runs"]))],
        lasted=lasted,
        figure_and_error=format_value_and_error,
    )


def breaks(name: str) -> Markup:
    """A name that a line may end in: after its commas, slashes and dots, not inside a word or a
    number."""
    return Markup(re.sub(r"([,/]|\.(?=\D))", r"\1<wbr>", str(escape(name))))


def duration(seconds: float) -> str:
    """41.3 is `41 s`, 3723 is `62 min`, 10_000 is `2 h 47 min`."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def lasted(session: Mapping[str, Any]) -> str:
    """How long a session lasted, and how it ended."""
    if session["ended"] is None:
        return "running, or killed"
    started, ended = (datetime.fromisoformat(session[key]) for key in ("started", "ended"))
    return f"{duration((ended - started).total_seconds())}, {session['outcome']}"


def _or_dash(shown: Any) -> Any:
    return lambda value: "–" if value is None else shown(value)
