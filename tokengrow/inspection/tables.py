"""Tables of `tokengrow inspect`."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.table import Table

from tokengrow.console.format import empty_table, format_count, format_small_number
from tokengrow.inspection.analysis import DEAD, Generation, Inspection, LayerSummary, fractions
from tokengrow.model.config import ROLES

DEFINITIONS = (
    "contribution c: mean over the text of f² ‖v‖², f a token's weight, v its value",
    "growth n: the n-th row of the lineage; in %, 0 and 100 are exact",
    "effective number: (Σ c)² / Σ c² over the tokens of a layer",
    f"dead: c is at most {DEAD:.1%} of Σ c² / Σ c, an even share of the effective number",
    "norm of the scores: root of the mean of ‖x Kᵀ‖² over the text",
)
"""Definitions of the measured quantities, one line each."""

MIN_SHARE = 1e-5
"""Smallest share that three decimals of a percentage show."""

SIZES_CAPTION = (
    "N: parameter tokens of a layer. D_in, D_out: its input and output channels (token ids for the "
    "embedding). tau: scale after the norm.\n"
)
"""Definitions of the columns of sizes."""


def inspection_tables(inspection: Inspection) -> Iterator[Table]:
    """Yield the tables of an inspection, each within 80 columns."""
    yield _model_table(inspection)
    yield _role_table(inspection)
    if inspection.checkpoint.lineage:
        yield _lineage_table(inspection)
    if inspection.text_tokens:
        yield _contribution_table(inspection)
        if len(nonempty_generations(inspection)) > 1:
            title = "Contribution of tokens added by a growth, in %"
            yield _layer_table(inspection, title, _added_share)
        yield _layer_table(inspection, "Effective number of tokens (dead ones)", _effective_number)
        yield _layer_table(inspection, "Norm of the scores", _score_norm)
    elif inspection.layers:
        yield _norm_table(inspection)


def history_table(inspections: Sequence[Inspection]) -> Table:
    """Build a table with one row per checkpoint: the mean share of each generation over the roles.

    Args:
        inspections: inspections of one run, oldest first.
    """
    newest = inspections[-1]
    shown = nonempty_generations(newest)
    columns = (*(generation_name(generation) for generation in shown), "dead")
    rows = empty_table("Contribution by generation in %, mean of roles", "step", columns)
    for inspection in inspections:
        shares = [*inspection.mean_shares(), *[None] * len(newest.generations)]
        cells = [format_percent(shares[generation.number]) for generation in shown]
        tokens = sum(generation.tokens for generation in inspection.generations)
        dead = f"{sum(inspection.dead_tokens()) / tokens:.1%}"
        rows.add_row(f"{inspection.checkpoint.step:,}", *cells, dead)
    return rows


def nonempty_generations(inspection: Inspection) -> list[Generation]:
    """Return the generations that have tokens."""
    return [generation for generation in inspection.generations if generation.tokens]


def generation_name(generation: Generation) -> str:
    """Return `initial`, or `growth 2` for the second entry of the lineage."""
    return f"growth {generation.number}" if generation.number else "initial"


def format_percent(share: float | None) -> str:
    """Format a share as a percentage with three decimals, in at most six characters.

    0 is exactly nothing, 100 is exactly everything, and a dash is a missing value.
    """
    if share is None:
        return "-"
    if share in (0, 1):
        return f"{100 * share:.0f}"
    if share < MIN_SHARE:
        return f"<{100 * MIN_SHARE:.3f}"
    return f"{100 * min(share, 1 - MIN_SHARE):.3f}"


def _model_table(inspection: Inspection) -> Table:
    """Build the table of the config, the sizes and the training counters."""
    checkpoint = inspection.checkpoint
    rows = empty_table(str(checkpoint.folder or "a model"), "model", ("",))
    for key, value in checkpoint.config.to_dict().items():
        if not isinstance(value, dict):  # values by role are in the table of roles
            rows.add_row(key, f"{value:,}" if type(value) is int else str(value))
    rows.add_section()
    rows.add_row("parameters", f"{checkpoint.config.num_parameters():,}")
    rows.add_row("FLOPs per token", format_count(checkpoint.config.flops_per_token()))
    rows.add_row("weights", ", ".join(inspection.dtypes))
    if checkpoint.train_state:
        rows.add_row("step", f"{checkpoint.step:,}")
        rows.add_row("trained on tokens", f"{checkpoint.train_state.tokens:,}")
    return rows


def _role_table(inspection: Inspection) -> Table:
    """Build the table of the sizes and parameters by role."""
    roles = inspection.role_parameters
    rows = empty_table(
        "Parameters by role",
        "role",
        ("N", "D_in", "D_out", "tau", "parameters", "share"),
        SIZES_CAPTION if any(each.tokens for each in roles) else None,
    )
    taus = inspection.checkpoint.config.to_dict().get("tau", {})
    shares = fractions([each.parameters for each in roles])
    for each, share in zip(roles, shares, strict=True):
        sizes = (each.tokens, each.d_in, each.d_out)
        tau = taus.get(each.role) if each.tokens else None
        rows.add_row(
            each.role,
            *("-" if size is None else f"{size:,}" for size in sizes),
            "-" if tau is None else f"{tau:.4g}",
            f"{each.parameters:,}",
            f"{share:.1%}",
        )
    return rows


def _lineage_table(inspection: Inspection) -> Table:
    """Build the table of growths and prunings, one row per axis."""
    rows = empty_table("Lineage", "#", ())
    for header in ("axis", "change"):
        rows.add_column(header, no_wrap=True)
    for header in ("at step", "parameters", "max\n|Δ logit|", "SHA-256\nbefore"):
        rows.add_column(header, justify="right", no_wrap=True)
    lineage = inspection.checkpoint.lineage
    rows.add_row("0", "initial", "", "", f"{lineage[0].source.parameters:,}", "", "")
    for number, entry in enumerate(lineage, 1):
        for place, step in enumerate(entry.steps):
            measured = ("", "", "", "")
            if place == 0:
                measured = (
                    f"{entry.source.step:,}",
                    f"{entry.target.parameters:,}",
                    format_small_number(entry.drift.max_logit),
                    (entry.source.weights_sha256 or "-")[:8],
                )
            axis = "pruned" if entry.operation == "prune" else step.axis
            name = "" if place else str(number)
            rows.add_row(name, axis, "\n".join(_describe_changes(step.changes)), *measured)
    return rows


def _describe_changes(changes: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """Yield one line per changed size, such as `ffn 256 -> 512`.

    The four roles of attention share a line if their changes are equal. Epsilons and taus follow
    from the sizes and are omitted.

    Args:
        changes: dotted key of the config to its value before and after.
    """
    attention = [changes.get(f"tokens.{role}") for role in ROLES if role != "ffn"]
    equal = attention[0] is not None and all(pair == attention[0] for pair in attention)
    if equal and attention[0]:
        yield f"attention {attention[0][0]:,} -> {attention[0][1]:,}"
    for key, (before, after) in changes.items():
        section, _, name = key.rpartition(".")
        if section == "tau" or key.endswith("_eps") or (equal and section and name != "ffn"):
            continue
        yield f"{name} {before:,} -> {after:,}"


def _contribution_table(inspection: Inspection) -> Table:
    """Build the table of contributions, one row per generation."""
    rows = empty_table(
        f"Contribution by generation in %, on {inspection.text_tokens:,} tokens of text",
        "generation",
        ("tokens", "updates", "dead", *ROLES),
    )
    shares, dead = inspection.shares(), inspection.dead_tokens()
    for generation in nonempty_generations(inspection):
        number = generation.number
        rows.add_row(
            generation_name(generation),
            f"{generation.tokens:,}",
            "-" if generation.updates is None else f"{generation.updates:,}",
            f"{dead[number] / generation.tokens:.1%}",
            *(format_percent(shares[role][number]) for role in ROLES),
        )
    return rows


def _layer_table(
    inspection: Inspection, title: str, format_cell: Callable[[LayerSummary], str]
) -> Table:
    """Build a table with one row per layer and one column per role."""
    rows = empty_table(title, "layer", ROLES)
    layers = {(layer.layer, layer.role): layer for layer in inspection.layers}
    for number in sorted({number for number, _ in layers}):
        rows.add_row(str(number), *(format_cell(layers[number, role]) for role in ROLES))
    return rows


def _added_share(layer: LayerSummary) -> str:
    assert layer.activity
    return format_percent(sum(fractions(layer.activity.contribution)[1:]))


def _effective_number(layer: LayerSummary) -> str:
    assert layer.activity
    return f"{layer.activity.effective:,.1f} ({sum(layer.activity.dead):,})"


def _score_norm(layer: LayerSummary) -> str:
    assert layer.activity
    return f"{layer.activity.score_norm:.3g}"


def _norm_table(inspection: Inspection) -> Table:
    """Build the table of the lengths of keys and values, which need no text."""
    rows = empty_table(
        "Length of keys and values by generation (root mean square)",
        "generation",
        ("tokens", "", *ROLES),
    )
    for generation in nonempty_generations(inspection):
        for part in ("keys", "values"):
            lengths = (_rms_length(inspection, role, generation.number, part) for role in ROLES)
            first = part == "keys"
            rows.add_row(
                generation_name(generation) if first else "",
                f"{generation.tokens:,}" if first else "",
                part,
                *(f"{length:.3g}" for length in lengths),
            )
    return rows


def _rms_length(inspection: Inspection, role: str, generation: int, part: str) -> float:
    """Return the root mean square over the tokens of a generation in all layers of a role."""
    layers = [layer for layer in inspection.layers if layer.role == role]
    tokens = [layer.tokens[generation] for layer in layers]
    norms = [
        (layer.key_norm if part == "keys" else layer.value_norm)[generation] for layer in layers
    ]
    total = sum(n * norm**2 for n, norm in zip(tokens, norms, strict=True))
    return float((total / max(sum(tokens), 1)) ** 0.5)
