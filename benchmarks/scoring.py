"""Time of scoring with the output head at scored positions only, compared with all positions.

    python -m benchmarks.scoring 150m
    python -m benchmarks.scoring 150m --context 80 --continuations 1 20 --windows 32

Scores windows of random tokens with a model of random weights, in batches of automatic size, on a
GPU if there is one (bfloat16 by autocast, otherwise float32). The two methods alternate. The share
of the head in the multiplications of a token bounds the time that can be saved; each row includes
it. Prints one CSV row per length of the continuation to stdout.
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
    """Scorer that applies the head at every position, and then selects the scored ones."""

    def _target_scores(self, hidden_states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See `Scorer._target_scores`."""
        rows, columns, targets = positions.to(self.device)
        with self.autocast():
            logits = self.model.logits(hidden_states)[rows, columns].float()
        log_probabilities = logits.log_softmax(dim=-1).gather(-1, targets[:, None])[:, 0]
        return log_probabilities.cpu(), (logits.argmax(dim=-1) == targets).cpu()


def time_scorers(
    config: ModelConfig, context: int, continuation: int, windows: int, rounds: int
) -> dict[str, Any]:
    """Time both methods on windows of the given lengths in tokens; return the row."""
    assert hasattr(Scorer, "_target_scores"), "EverywhereScorer overrides this method"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = TokenFormer(config).eval().to(device)
    ids = torch.randint(config.vocab_size, (windows, context + continuation)).tolist()
    requests = [Window(row[:context], row[context:]) for row in ids]
    scorers = {
        "scored": Scorer(model, autocast=_autocast(device)),
        "everywhere": EverywhereScorer(model, autocast=_autocast(device)),
    }
    times: dict[str, list[float]] = {name: [] for name in scorers}
    log_likelihoods: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, scorer in scorers.items():
            began = time.perf_counter()
            results = scorer.score(requests)  # results on the CPU: the device has finished
            if turn:
                times[name].append(time.perf_counter() - began)
            log_likelihoods[name] = sum(result.log_likelihood for result in results)
    if abs(log_likelihoods["scored"] / log_likelihoods["everywhere"] - 1) > 1e-3:
        raise SystemExit(f"The two methods give different results: {log_likelihoods}")
    scored, everywhere = (median(seconds) for seconds in times.values())
    head = config.vocab_size * config.width
    return {
        "context": context,
        "continuation": continuation,
        "windows": windows,
        "scored_s": f"{scored:.3f}",
        "everywhere_s": f"{everywhere:.3f}",
        "ratio": f"{scored / everywhere:.3f}",
        "share_of_head": f"{head / config.matmul_parameters():.3f}",
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _autocast(device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    if device.type == "cpu":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def main() -> None:
    """Print one row per length of the continuation."""
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
