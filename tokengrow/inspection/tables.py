"""The tables of `tokengrow inspect`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from tokengrow.console.format import count, exponent, table
from tokengrow.inspection.analysis import DEAD, Generation, Inspection, LayerSummary, fractions
from tokengrow.model.config import ROLES

DEFINITIONS = (
    "contribution c: mean over the text of f² ‖v‖², f a token's weight, v its value",
    "growth n: the n-th row of the lineage; in %, 0 and 100 are exact",
    "effective number: (Σ c)² / Σ c² over the tokens of a layer",
    f"dead: c is at most {DEAD:.1%} of Σ c² / Σ c, an even share of the effective number",
    "norm of the scores: root of the mean of ‖x Kᵀ‖² over the text",
)
"""What the numbers are, one line each."""

MIN_SHARE = 1e-5
"""The smallest that three decimals of a per cent show."""

PARTS_CAPTION = (
    "N: parameter tokens of a layer. D_in, D_out: channels (or token ids) that it reads, and that "
    "it gives. tau: scale after the norm.\n"
)
"""What the columns of sizes are."""


def inspection_tables(found: Inspection) -> Iterator[Table]:
    """An inspection as small tables, each within 80 columns."""
    yield _sizes(found)
    yield _parts(found)
    if found.checkpoint.lineage:
        yield _lineage(found)
    if found.text_tokens:
        yield _work(found)
        if len(nonempty_generations(found)) > 1:
            yield _by_layer(found, "Contribution of tokens that a growth brought, in %", _appended)
        yield _by_layer(found, "Effective number of tokens (dead ones)", _effective)
        yield _by_layer(found, "Norm of the scores", _score_norm)
    elif found.layers:
        yield _norms(found)


def history_table(past: Sequence[Inspection]) -> Table:
    """One row per checkpoint of a run: the share of each generation, in the mean over the roles."""
    newest = past[-1]
    columns = tuple(generation_name(generation) for generation in nonempty_generations(newest))
    rows = table("Contribution by generation in %, mean of roles", "step", (*columns, "dead"))
    for found in past:
        shares = [*found.mean_shares(), *[None] * len(newest.generations)]
        cells = [
            format_percent(shares[generation.number]) for generation in nonempty_generations(newest)
        ]
        tokens = sum(generation.tokens for generation in found.generations)
        rows.add_row(
            f"{found.checkpoint.step:,}", *cells, f"{sum(found.dead_tokens()) / tokens:.1%}"
        )
    return rows


def nonempty_generations(found: Inspection) -> list[Generation]:
    """The generations that have tokens."""
    return [generation for generation in found.generations if generation.tokens]


def generation_name(generation: Generation) -> str:
    """`growth 2`: the growth by its number in the lineage."""
    return f"growth {generation.number}" if generation.number else "birth"


def format_percent(share: float | None) -> str:
    """Per cent with three decimals, six characters at most: 0 is nothing at all, 100 is all, a dash
    not there."""
    if share is None:
        return "-"
    if share in (0, 1):
        return f"{100 * share:.0f}"
    if share < MIN_SHARE:
        return f"<{100 * MIN_SHARE:.3f}"
    return f"{100 * min(share, 1 - MIN_SHARE):.3f}"


def _sizes(found: Inspection) -> Table:
    checkpoint = found.checkpoint
    rows = table(str(checkpoint.folder or "a model"), "model", ("",))
    for key, value in checkpoint.config.to_dict().items():
        if not isinstance(value, dict):  # what each role has of its own stands with the roles
            rows.add_row(key, f"{value:,}" if type(value) is int else str(value))
    rows.add_section()
    size = checkpoint.config.num_parameters()
    rows.add_row("parameters", f"{size:,}")
    rows.add_row("FLOPs per token", count(checkpoint.config.flops_per_token()))
    rows.add_row("weights", ", ".join(found.dtypes))
    if checkpoint.train_state:
        rows.add_row("step", f"{checkpoint.step:,}")
        rows.add_row("trained on tokens", f"{checkpoint.train_state.tokens:,}")
    return rows


def _parts(found: Inspection) -> Table:
    rows = table(
        "Parameters by role",
        "role",
        ("N", "D_in", "D_out", "tau", "parameters", "share"),
        PARTS_CAPTION if any(part.tokens for part in found.parts) else None,
    )
    taus = found.checkpoint.config.to_dict().get("tau", {})
    shares = fractions([part.parameters for part in found.parts])
    for part, share in zip(found.parts, shares, strict=True):
        sizes = (part.tokens, part.d_in, part.d_out)
        tau = taus.get(part.role) if part.tokens else None
        rows.add_row(
            part.role,
            *("-" if size is None else f"{size:,}" for size in sizes),
            "-" if tau is None else f"{tau:.4g}",
            f"{part.parameters:,}",
            f"{share:.1%}",
        )
    return rows


def _lineage(found: Inspection) -> Table:
    rows = table("Lineage", "#", ())
    for header in ("axis", "change"):
        rows.add_column(header, no_wrap=True)
    for header in ("at step", "parameters", "max\n|Δ logit|", "SHA-256\nbefore"):
        rows.add_column(header, justify="right", no_wrap=True)
    lineage = found.checkpoint.lineage
    rows.add_row("0", "birth", "", "", f"{lineage[0].source.parameters:,}", "", "")
    for number, entry in enumerate(lineage, 1):
        for place, step in enumerate(entry.steps):
            ends = ("", "", "", "")
            if place == 0:
                ends = (
                    f"{entry.source.step:,}",
                    f"{entry.target.parameters:,}",
                    exponent(entry.drift.max_logit),
                    (entry.source.weights_sha256 or "-")[:8],
                )
            axis = "pruned" if entry.operation == "prune" else step.axis
            name = "" if place else str(number)
            rows.add_row(name, axis, "\n".join(_changes(step.changes)), *ends)
    return rows


def _changes(changes: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    """`ffn 256 -> 512`: a line per size that changed; the four of attention in one if they agree.

    Args:
        changes: of a step of the lineage, dotted key to (before, after); epsilons and taus follow
            from sizes and are left out.
    """
    attention = [changes.get(f"tokens.{role}") for role in ROLES if role != "ffn"]
    agree = attention[0] is not None and all(pair == attention[0] for pair in attention)
    if agree and attention[0]:
        yield f"attention {attention[0][0]:,} -> {attention[0][1]:,}"
    for key, (before, after) in changes.items():
        section, _, role = key.rpartition(".")
        if section == "tau" or key.endswith("_eps") or (agree and section and role != "ffn"):
            continue
        yield f"{role} {before:,} -> {after:,}"


def _work(found: Inspection) -> Table:
    """Who does the work: a row per generation."""
    rows = table(
        f"Contribution by generation in %, on {found.text_tokens:,} tokens of text",
        "came with",
        ("tokens", "updates", "dead", *ROLES),
    )
    shares, dead = found.shares(), found.dead_tokens()
    for generation in nonempty_generations(found):
        number = generation.number
        rows.add_row(
            generation_name(generation),
            f"{generation.tokens:,}",
            "-" if generation.updates is None else f"{generation.updates:,}",
            f"{dead[number] / generation.tokens:.1%}",
            *(format_percent(shares[role][number]) for role in ROLES),
        )
    return rows


def _by_layer(found: Inspection, title: str, cell: Any) -> Table:
    """A row per layer, a column per role."""
    rows = table(title, "layer", ROLES)
    layers = {(each.layer, each.role): each for each in found.layers}
    for number in sorted({number for number, _ in layers}):
        rows.add_row(str(number), *(cell(layers[number, role]) for role in ROLES))
    return rows


def _appended(layer: LayerSummary) -> str:
    assert layer.activity
    return format_percent(sum(fractions(layer.activity.contribution)[1:]))


def _effective(layer: LayerSummary) -> str:
    assert layer.activity
    return f"{layer.activity.effective:,.1f} ({sum(layer.activity.dead):,})"


def _score_norm(layer: LayerSummary) -> str:
    assert layer.activity
    return f"{layer.activity.score_norm:.3g}"


def _norms(found: Inspection) -> Table:
    """What can be said without text: how long keys and values are."""
    rows = table(
        "Length of keys and values by generation (root mean square)",
        "came with",
        ("tokens", "", *ROLES),
    )
    for generation in nonempty_generations(found):
        for part in ("keys", "values"):
            lengths = (_length(found, role, generation.number, part) for role in ROLES)
            first = part == "keys"
            rows.add_row(
                generation_name(generation) if first else "",
                f"{generation.tokens:,}" if first else "",
                part,
                *(f"{length:.3g}" for length in lengths),
            )
    return rows


def _length(found: Inspection, role: str, generation: int, part: str) -> float:
    """Root mean square over the tokens of a generation, in all layers of a role."""
    layers = [layer for layer in found.layers if layer.role == role]
    tokens = [layer.tokens[generation] for layer in layers]
    norms = [
        (layer.key_norm if part == "keys" else layer.value_norm)[generation] for layer in layers
    ]
    total = sum(n * norm**2 for n, norm in zip(tokens, norms, strict=True))
    return float((total / max(sum(tokens), 1)) ** 0.5)
