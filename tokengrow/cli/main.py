"""`tokengrow VERB ...`: finds the verb's module and runs it as the program."""

import runpy
import sys

from tokengrow import __version__
from tokengrow.parsing import suggest
from tokengrow.paths import recipes

VERBS = {
    "train": ("recipes=NAME [key=value ...] [--multirun]", "a ladder: train, grow, train on"),
    "grow": ("source=DIR model=NAME out=DIR", "one growth, verified, with lineage"),
    "prune": ("source=DIR model=SMALLER out=DIR", "fewer parameter tokens, ranked by contribution"),
    "plan": ("recipes=NAME | source=DIR model=NAME", "what it will do, without building a model"),
    "data": ("data=NAME out=DIR", "tokenise once"),
    "convert": (
        "source=PATH to=tokengrow|hf|neox out=DIR",
        "published weights and YAMLs, in and out",
    ),
    "eval": ("source=DIR tasks=[NAME,...]", "tasks of the lm-evaluation-harness, perplexity"),
    "generate": ('source=DIR prompt="..." | prompts=FILE', "text from a checkpoint"),
    "inspect": ("source=DIR", "what a checkpoint is, what its parameter tokens do"),
    "report": ("runs=[DIR,...] out=DIR", "runs beside each other: figures and a page"),
    "bench": ("suite=pattention|step|decode|data", "how fast it is here, beside its peers"),
}
"""Verb to (its usual arguments, what it does)."""


def main() -> None:
    """The console script: dispatches to `tokengrow.cli.VERB`."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return
    if arguments[0] == "--version":
        print(f"tokengrow {__version__}")
        return
    verb = arguments[0]
    if verb not in VERBS:
        print(f"tokengrow: unknown verb {verb!r}{suggest(verb, list(VERBS))}", file=sys.stderr)
        sys.exit(2)
    # As the program itself, not by a call: what launches further processes repeats the command
    # line of `-m tokengrow.cli.VERB`, and would lose the verb that a dispatcher took off it.
    sys.argv = [f"tokengrow {verb}", *arguments[1:]]
    runpy.run_module(f"tokengrow.cli.{verb}", run_name="__main__", alter_sys=True)


def _help() -> str:
    lines = [
        "tokengrow: train a small TokenFormer, grow it exactly, go on training",
        "",
        *(f"  tokengrow {verb:<9} {usual:<42} {what}" for verb, (usual, what) in VERBS.items()),
        "",
        f"recipes: {', '.join(recipes())}",
        "tokengrow VERB --help: its keys and groups; --cfg job --resolve: the whole config",
    ]
    return "\n".join(lines)
