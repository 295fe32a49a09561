"""HTML page of a report: one file that needs no other files and no network."""

import base64
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from tokengrow.console.format import (
    format_count,
    format_duration,
    format_power,
    format_small_number,
)
from tokengrow.evaluation.scores import format_value_and_error, metric_label
from tokengrow.reports.plots import Png, line_style

TEMPLATE = "page.html.jinja"

CAPTIONS = {
    "loss-vs-flops": (
        "Loss against compute",
        "FLOPs are cumulative: they include all stages and the source of a run. The axis is "
        "logarithmic, so equal distances are equal ratios.",
    ),
    "loss-vs-flops-end": (
        "Loss against compute, last part",
        "The same curves from one third of the smallest total FLOPs.",
    ),
    "loss-vs-tokens": (
        "Loss against tokens",
        "Tokens trained on are cumulative: they include all stages and the source of a run.",
    ),
    "loss-vs-time": (
        "Loss against wall time",
        "Seconds of training, including growth and validation. The preparation of the data and "
        "work lost when a process was killed are excluded.",
    ),
    "cost": (
        "Cost of each run",
        "Each bar has one part per size, darker for later sizes, after a grey part for the source "
        "of the run. The black mark is calculated, not measured: it is the cost of training only "
        "the last size on as many tokens. The loss is the lowest validation loss of the run.",
    ),
}
"""Heading and caption of each plot."""


def render_page(report: Mapping[str, Any], plots: Mapping[str, Png]) -> str:
    """Return the report as HTML.

    Args:
        report: content from `tokengrow.reports.report.Report.to_dict`.
        plots: name mapped to PNG file, in the order of the page.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "power": _or_dash(format_power),
        "count": _or_dash(format_count),
        "integer": _or_dash("{:,}".format),
        "loss": _or_dash("{:.4f}".format),
        "drift": _or_dash(format_small_number),
        "duration": _or_dash(format_duration),
        "metric": metric_label,
        "ratio": lambda ratio: "not reached" if ratio is None else f"{ratio:.2f} ×",
        "breakable": add_line_breaks,
        "base64": lambda png: base64.b64encode(png).decode(),
    }
    text = (files("tokengrow.reports") / TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(text).render(
        **report,
        plots=[(name, *CAPTIONS[name], png) for name, png in plots.items()],
        styles=[line_style(number) for number in range(len(report["runs"]))],
        session_length=session_length,
        value_and_error=format_value_and_error,
    )


def add_line_breaks(name: str) -> Markup:
    """Return a name in HTML that may wrap after commas, slashes and the dots of keys."""
    return Markup(re.sub(r"([,/]|\.(?=\D))", r"\1<wbr>", str(escape(name))))


def session_length(session: Mapping[str, Any]) -> str:
    """Return the duration and the outcome of a session, as in `3 min, stopped`."""
    if session["ended"] is None:
        return "running, or killed"
    started, ended = (datetime.fromisoformat(session[key]) for key in ("started", "ended"))
    return f"{format_duration((ended - started).total_seconds())}, {session['outcome']}"


def _or_dash(format_value: Callable[[Any], str]) -> Callable[[Any], str]:
    """Return a formatter that shows None as a dash."""
    return lambda value: "–" if value is None else format_value(value)
