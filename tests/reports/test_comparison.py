"""Tests of recipe differences, the lineage tree and comparability notes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from report_runs import make_record

from tokengrow.reports.comparison import (
    Branch,
    comparability_notes,
    config_differences,
    lineage_tree,
)
from tokengrow.reports.run_data import RunRecord

# Recipe differences


def differing_values(*names: str, runs: dict[str, RunRecord]) -> dict[str, tuple[str | None, ...]]:
    differences = config_differences([runs[name] for name in names])
    return {each.key: each.values for each in differences}


def test_differing_keys_are_listed(runs: dict[str, RunRecord]) -> None:
    values = differing_values("grown", "scratch", runs=runs)
    assert values["seed"] == ("0", "1")
    assert values["stages"] == ("n8: 4 steps, then n12: 4 steps", "n12: 6 steps")
    assert values["stages.n12.steps"] == ("4", "6")
    assert not any(key.startswith("stages.n8.") or key == "out" for key in values)


def test_published_run_differs_in_its_growth(runs: dict[str, RunRecord]) -> None:
    assert differing_values("grown", "published", runs=runs) == {
        "growth.init": ("zero_key", "published"),
        "growth.optimizer": ("carry", "fresh"),
        "growth.tolerance": ("null", "inf"),
    }


def test_key_of_only_one_of_two_equally_named_stages_differs() -> None:
    sizes = {"large": {"steps": 4, "model": {"context_length": 8, "tau": {"ffn": 2.0}}}}
    other = {"large": {"steps": 4, "model": {"context_length": 8, "architecture": "transformer"}}}
    one, two = (
        make_record(name, (1e3, 4.0), config={"stages": stages})
        for name, stages in (("tokenformer", sizes), ("transformer", other))
    )
    assert {each.key: each.values for each in config_differences([one, two])} == {
        "stages.large.model.tau.ffn": ("2", None),
        "stages.large.model.architecture": (None, "transformer"),
    }


# Lineage


def tree_of_names(branches: list[Branch], runs: list[RunRecord]) -> dict[str, Any]:
    """Return the tree as {run: [(size, the tree of runs that start from it)]}."""
    return {
        runs[branch.run].name: [
            (node.text.partition(":")[0], tree_of_names(node.branches, runs))
            for node in branch.nodes
        ]
        for branch in branches
    }


def test_run_is_a_branch_of_the_size_of_its_source(runs: dict[str, RunRecord]) -> None:
    shown = [runs[name] for name in ("small", "on", "after", "scratch")]
    large = runs["grown"].rungs[1].parameters
    pruned = large - 2 * (24 - 20) * (32 + 32)  # layers, tokens of the FFN, key and value
    assert tree_of_names(lineage_tree(shown), shown) == {
        "small": [
            (
                "n8",
                {
                    "on": [("n8", {})],
                    "after": [
                        (f"{large:,} parameters, outside of any run", {}),
                        (f"{pruned:,} parameters, outside of any run", {}),
                        ("n12", {}),
                    ],
                },
            )
        ],
        "scratch": [("n12", {})],
    }


def test_growths_and_prunings_name_the_changed_sizes(runs: dict[str, RunRecord]) -> None:
    shown = [runs["small"], runs["after"]]
    (root,) = lineage_tree(shown)
    (after,) = root.nodes[0].branches
    grown, pruned, trained = (node.growth for node in after.nodes)
    assert grown is not None and pruned is not None
    sizes = "grown: tokens.query, key, value, output 8 → 12; tokens.ffn 16 → 24; largest |Δ logit| "
    assert grown.startswith(sizes)
    assert pruned.startswith("pruned: tokens.ffn 24 → 20; ")
    assert trained is None
    assert after.start == "from small, step 4"


def test_given_source_is_preferred_among_equal_weights(runs: dict[str, RunRecord]) -> None:
    # The first stage of `grown` has the recipe, the seed and therefore the bits of `small`.
    assert set(runs["small"].weights) < set(runs["grown"].weights)
    shown = [runs["grown"], runs["small"], runs["on"]]
    tree = tree_of_names(lineage_tree(shown), shown)
    assert tree["small"] == [("n8", {"on": [("n8", {})]})]


def test_source_that_is_not_shown_is_named(runs: dict[str, RunRecord], runs_folder: Path) -> None:
    (root,) = lineage_tree([runs["on"]])
    assert root.start == f"from {runs_folder}/small, which is not among these runs"


def test_source_without_a_recorded_hash_is_found_by_path(runs: dict[str, RunRecord]) -> None:
    shown = [runs["small"], replace(runs["on"], source=None)]
    tree = tree_of_names(lineage_tree(shown), shown)
    assert tree == {"small": [("n8", {"on": [("n8", {})]})]}


# Comparability


def test_different_validation_tokens_are_noted() -> None:
    one = make_record("one", (1e3, 4.0))
    better = make_record("better", (1e3, 3.9))
    other = replace(better, name="other", fingerprint="other tokens")
    assert comparability_notes([one, better], []) == []
    (note,) = comparability_notes([one, other], [])
    assert note.startswith("The runs were not all validated on the same tokens")
    assert note.endswith("Their losses and ratios are not comparable.")


def test_different_devices_are_noted() -> None:
    cpu, gpu = ({"device": name, "processes": 1} for name in ("CPU (1 thread)", "NVIDIA H100"))
    one = make_record("one", (1e3, 4.0), sessions=(cpu,))
    other = make_record("other", (1e3, 3.9), sessions=(gpu,))
    assert comparability_notes([one, other], []) == [
        "The runs were trained on different devices. Their wall times are not comparable."
    ]


def test_coinciding_curves_are_noted() -> None:
    one = make_record("one", (1e3, 4.0), (2e3, 3.5))
    same = replace(one, name="same")
    longer = make_record("longer", (1e3, 4.0), (2e3, 3.5), (3e3, 3.4))
    assert comparability_notes([one, same, longer], []) == [
        "one and same have the same losses at the same costs. Their curves coincide in the figures."
    ]
