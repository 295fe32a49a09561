"""Scoring with the output head applied where something is scored, against everywhere.

    python -m benchmarks.scoring 150m
    python -m benchmarks.scoring 150m --context 80 --continuations 1 20 --windows 32

Windows of random tokens under a model of random weights, in batches of automatic size, on a GPU if
there is one (bfloat16 by autocast, else float32); the two ways by turns. What is left of the time
is bounded by the share of the head in a token's multiplications, which a row gives too. One CSV row
for each length of the continuation on stdout.
"""

import argparse
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tokengrow.bench.rows import print_rows
from tokengrow.distributed.fabric import device_name
from tokengrow.evaluation.scoring import Scorer, Window
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer


class EverywhereScorer(Scorer):
    """Applies the head at every place, and then looks up those that are scored."""

    def _look_up(self, hidden_states: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns, targets = places.to(self.device)
        with self.autocast():
            logits = self.model.logits(hidden_states)[rows, columns].float()
        found = logits.log_softmax(dim=-1).gather(-1, targets[:, None])[:, 0]
        return found.cpu(), (logits.argmax(dim=-1) == targets).cpu()


def time_scorers(
    config: ModelConfig, context: int, continuation: int, windows: int, rounds: int
) -> dict[str, Any]:
    """One row: windows of a context and a continuation of so many tokens, scored in both ways."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = TokenFormer(config).eval().to(device)
    ids = torch.randint(config.vocab_size, (windows, context + continuation)).tolist()
    asked = [Window(row[:context], row[context:]) for row in ids]
    scorers = {
        "scored": Scorer(model, autocast=_autocast(device)),
        "everywhere": EverywhereScorer(model, autocast=_autocast(device)),
    }
    times: dict[str, list[float]] = {way: [] for way in scorers}
    found: dict[str, float] = {}
    for turn in range(rounds + 1):
        for way, scorer in scorers.items():
            begun = time.perf_counter()
            results = scorer.score(asked)  # they come on the CPU: the device has ended
            if turn:
                times[way].append(time.perf_counter() - begun)
            found[way] = sum(result.log_likelihood for result in results)
    if abs(found["scored"] / found["everywhere"] - 1) > 1e-3:
        raise SystemExit(f"the two ways do not agree: {found}")
    scored, everywhere = (median(each) for each in times.values())
    head = config.vocab_size * config.width
    return {
        "context": context,
        "continuation": continuation,
        "windows": windows,
        "scored_s": f"{scored:.3f}",
        "everywhere_s": f"{everywhere:.3f}",
        "ratio": f"{scored / everywhere:.3f}",
        "share_of_head": f"{head / config.multiplied_parameters():.3f}",
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _autocast(device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    if device.type == "cpu":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def main() -> None:
    """Prints a row for each length of the continuation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", help="size of the model")
    parser.add_argument("--context", type=int, default=80)
    parser.add_argument("--continuations", type=int, nargs="+", default=[1, 20, 80])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    config = ModelConfig.preset(args.preset)
    print_rows(
        time_scorers(config, args.context, continuation, args.windows, args.rounds)
        for continuation in args.continuations
    )


if __name__ == "__main__":
    main()
