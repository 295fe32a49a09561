"""Sampling from a model with a KV cache.

Shapes: `B` batch, `T` prompt length, `V` vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tokengrow.errors import UserError
from tokengrow.model.decode import Decoder
from tokengrow.model.tokenformer import LanguageModel


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen."""

    max_tokens: int = 128
    """The most tokens to generate."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probabilities reach this."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        checks = {
            "max_tokens must be at least 1": self.max_tokens >= 1,
            "temperature must be 0 or at least 0.001": self.temperature == 0
            or self.temperature >= 1e-3,
            "top_k must not be negative": self.top_k >= 0,
            "seed must lie in [0, 2**63)": 0 <= self.seed < 2**63,
            "top_p must lie in (0, 1]": 0 < self.top_p <= 1,
        }
        for message, holds in checks.items():
            if not holds:
                raise UserError(f"sampling.{message}: {getattr(self, message.split()[0])}")


def generate(
    model: LanguageModel, prompt: Tensor, config: SamplingConfig, end_of_text: int | None = None
) -> Iterator[Tensor]:
    """Yields the next token of every row until `max_tokens` or until each row has ended.

    Args:
        model: on the device of the prompt.
        prompt: [B, T] int64, T >= 1.
        config: how to sample.
        end_of_text: the id that ends a row; a row that has ended goes on yielding it.

    Yields:
        [B] int64, on the CPU.
    """
    if prompt.shape[1] == 0:
        raise UserError("prompt is empty: give at least one token")
    batch, length = prompt.shape
    decoder = Decoder(model, batch, length + config.max_tokens)
    generator = torch.Generator(prompt.device).manual_seed(config.seed)
    ended = torch.zeros(batch, dtype=torch.bool)
    logits = decoder.prefill(prompt)
    for left in reversed(range(config.max_tokens)):
        drawn = sample(logits, config, generator)
        arrive = _send_to_cpu(drawn)
        # Before anybody waits: a GPU computes while this token is decoded and printed.
        if left:
            logits = decoder.step(drawn)
        token = arrive()
        if end_of_text is not None:
            token = torch.where(ended, end_of_text, token)
            ended |= token == end_of_text
        yield token
        if ended.all():
            return


def _send_to_cpu(token: Tensor) -> Callable[[], Tensor]:
    """Starts the copy; what is returned waits for it alone, not for work that is queued later."""
    if not token.is_cuda:
        return token.cpu
    copy = token.to("cpu", non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(token.device))

    def arrive() -> Tensor:
        done.synchronize()
        return copy

    return arrive


def sample(logits: Tensor, config: SamplingConfig, generator: torch.Generator) -> Tensor:
    """Draws one token per row from [B, V] logits; [B] int64."""
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / config.temperature
    if config.top_k:
        kth = logits.topk(min(config.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if config.top_p < 1:
        logits = _keep_nucleus(logits, config.top_p)
    # What torch.multinomial draws, by the same noise, without its checks, which wait for the GPU.
    probabilities = logits.softmax(dim=-1)
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / noise).argmax(dim=-1)


def _keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Nucleus sampling (arXiv 1904.09751): drops what lies behind the first top_p of the mass."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    # A token stays when the mass in front of it is below top_p, so the likeliest always stays.
    dropped = probabilities.cumsum(dim=-1) - probabilities >= top_p
    return logits.masked_fill(dropped.gather(-1, order.argsort(dim=-1)), -torch.inf)
