"""tokengrow generate: text from a checkpoint, printed as it comes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from rich.console import Console

from tokengrow.checkpoint.store import Checkpoint, load_checkpoint
from tokengrow.cli.resolve import plain
from tokengrow.cli.verb import run_verb
from tokengrow.evaluation.source import checkpoint_tokenizer
from tokengrow.model.generate import SamplingConfig
from tokengrow.model.texts import write
from tokengrow.typed import typed


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """The keys of generate.yaml."""

    source: str
    """Checkpoint, or run whose newest checkpoint is taken."""
    prompt: str
    """Start of the text; empty: end-of-text, the start of a document."""
    sampling: SamplingConfig
    """How tokens are chosen."""


def main(config: DictConfig) -> None:
    """Prints the prompt and what the model makes of it."""
    arguments = typed(GenerateArguments, plain(config))
    checkpoint = load_checkpoint(arguments.source)
    console = Console(highlight=False)
    for piece in stream_text(checkpoint, arguments.prompt, arguments.sampling):
        console.out(piece, end="")
    console.out("")


def stream_text(checkpoint: Checkpoint, prompt: str, sampling: SamplingConfig) -> Iterator[str]:
    """Yields the prompt, then text as the model writes it, until end-of-text or `max_tokens`.

    Args:
        checkpoint: with a tokenizer.
        prompt: its start; empty stands for end-of-text, the start of a document.
        sampling: how tokens are chosen.

    Raises:
        UserError: a checkpoint without a tokenizer.
    """
    tokenizer = checkpoint_tokenizer(checkpoint)
    # Half-precision weights stay so on a GPU alone: a CPU computes slower in them, not faster.
    device, dtype = ("cuda", None) if torch.cuda.is_available() else ("cpu", torch.float32)
    if prompt:
        yield prompt
    model = checkpoint.model.to(device, dtype)
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    shown = 0
    for [text] in write(model, [ids], tokenizer, sampling):
        yield text.text[shown:]
        shown = len(text.text)


if __name__ == "__main__":
    run_verb("generate", main)
