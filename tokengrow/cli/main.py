"""Entry point: `tokengrow VERB ...` runs the module of the verb as the program."""

import runpy
import sys

from tokengrow import __version__
from tokengrow.parsing import suggest
from tokengrow.paths import recipes

VERBS = {
    "train": (
        "recipes=NAME [key=value ...] [--multirun]",
        "train a ladder: train, grow, keep training",
    ),
    "grow": ("source=DIR model=NAME out=DIR", "grow a checkpoint once, and verify it"),
    "prune": ("source=DIR model=SMALLER out=DIR", "remove parameter tokens that contribute least"),
    "plan": ("recipes=NAME | source=DIR model=NAME", "show size, FLOPs, memory and time"),
    "data": ("data=NAME out=DIR", "tokenise a corpus into a token store"),
    "convert": (
        "source=PATH to=tokengrow|hf|neox out=DIR",
        "convert weights or a GPT-NeoX config",
    ),
    "eval": ("source=DIR tasks=[NAME,...]", "run lm-evaluation-harness tasks, or perplexity"),
    "generate": ('source=DIR prompt="..." | prompts=FILE', "generate text from a checkpoint"),
    "inspect": ("source=DIR", "show sizes, lineage and use of parameter tokens"),
    "report": ("runs=[DIR,...] out=DIR", "compare runs on one page"),
    "bench": ("suite=pattention|step|decode|data", "measure speed against baselines"),
}
"""Verb to its usual arguments and its description."""


def main() -> None:
    """Run the console script."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return
    if arguments[0] == "--version":
        print(f"tokengrow {__version__}")
        return
    verb = arguments[0]
    if verb not in VERBS:
        print(f"tokengrow: Unknown verb {verb!r}. {suggest(verb, list(VERBS))}", file=sys.stderr)
        sys.exit(2)
    # As the program itself instead of a call: launchers start further processes with the command
    # line of `-m tokengrow.cli.VERB`, and would lose the verb.
    sys.argv = [f"tokengrow {verb}", *arguments[1:]]
    runpy.run_module(f"tokengrow.cli.{verb}", run_name="__main__", alter_sys=True)


def _help() -> str:
    lines = [
        "tokengrow: train a small TokenFormer, grow it exactly, keep training",
        "",
        *(f"  tokengrow {verb:<9} {usage:<42} {text}" for verb, (usage, text) in VERBS.items()),
        "",
        f"recipes: {', '.join(recipes())}",
        "tokengrow VERB --help: its keys and groups; --cfg job --resolve: the complete config",
    ]
    return "\n".join(lines)
