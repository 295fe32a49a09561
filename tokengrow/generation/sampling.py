"""Sampling from a model with a KV cache.

Shapes: `B` batch, `T` length of the longest prompt, `V` vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokengrow.errors import UserError
from tokengrow.generation.decoder import Decoder
from tokengrow.model.tokenformer import LanguageModel


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling settings."""

    max_tokens: int = 128
    """The most tokens to generate."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probabilities reach this."""
    repetition_penalty: float = 1.0
    """Above 1: makes tokens that the prompt or the text holds already less likely."""
    seed: int = 0
    """Seed of the draws of each text."""

    def __post_init__(self) -> None:
        checks = {
            "max_tokens must be at least 1": self.max_tokens >= 1,
            "temperature must be 0 or at least 0.001": self.temperature == 0
            or self.temperature >= 1e-3,
            "top_k must be 0 or more": self.top_k >= 0,
            "seed must be in [0, 2**63)": 0 <= self.seed < 2**63,
            "top_p must be in (0, 1]": 0 < self.top_p <= 1,
            "repetition_penalty must be a number above 0": 0 < self.repetition_penalty < math.inf,
        }
        for message, holds in checks.items():
            if not holds:
                value = getattr(self, message.split()[0])
                raise UserError(f"sampling.{message}, got {value}.")


def generate(
    model: LanguageModel,
    prompts: Sequence[Tensor] | Tensor,
    config: SamplingConfig,
    end_of_text: int | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every text until `max_tokens` or until each text has ended.

    What is drawn for a text depends on its prompt and the seed, not on the rest of the batch.

    Args:
        model: on the device where it is to compute.
        prompts: [T] int64 of each text, T >= 1; they may differ in length.
        config: how to sample.
        end_of_text: id that ends a text; an ended text keeps yielding it.

    Yields:
        [B] int64, on the CPU.
    """
    ids, start = pad_left(prompts)
    device = model.embedding.weight.device
    ids, start = ids.to(device), None if start is None else start.to(device)
    batch, length = ids.shape
    decoder = Decoder(model, batch, length + config.max_tokens)
    choose = _Chooser(ids, model.config.vocab_size, config)
    ended = torch.zeros(batch, dtype=torch.bool)
    logits = decoder.prefill(ids, start)
    for left in reversed(range(config.max_tokens)):
        chosen = choose(logits)
        arrive = _send_to_cpu(chosen)
        # Queued first: a GPU computes while this token is decoded and printed.
        if left:
            logits = decoder.step(chosen)
        token = arrive()
        if end_of_text is not None:
            token = torch.where(ended, end_of_text, token)
            ended |= token == end_of_text
        yield token
        if ended.all():
            return


def pad_left(prompts: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor | None]:
    """Prompts of different lengths in one tensor, all of them ending in the last column.

    Returns:
        [B, T] int64, and [B] int64 the column in which each starts; None: all in the first. Padding
        repeats a prompt's first token, so that a row holds no token that its prompt does not.

    Raises:
        UserError: an empty prompt.
    """
    lengths = [len(prompt) for prompt in prompts]
    if 0 in lengths:
        raise UserError("prompt is empty: give at least one token")
    longest = max(lengths)
    if min(lengths) == longest:
        return torch.stack(list(prompts)), None
    padding = [longest - length for length in lengths]
    rows = [torch.cat((p[:1].expand(n), p)) for p, n in zip(prompts, padding, strict=True)]
    return torch.stack(rows), torch.tensor(padding)


class _Chooser:
    """Chooses the next token of every text, and remembers what each one holds.

    Args:
        ids: [B, T] int64 of the prompts, padding included.
        vocab_size: V.
        config: how.
    """

    def __init__(self, ids: Tensor, vocab_size: int, config: SamplingConfig) -> None:
        self._config = config
        self._generator = torch.Generator(ids.device).manual_seed(config.seed)
        self._held: Tensor | None = None
        if config.repetition_penalty != 1:
            held = torch.zeros(len(ids), vocab_size, dtype=torch.bool, device=ids.device)
            self._held = held.scatter_(1, ids, True)  # [B, V]

    def __call__(self, logits: Tensor) -> Tensor:
        """[B] int64 from [B, V]."""
        if self._held is None:
            return sample(logits, self._config, self._generator)
        logits = penalize(logits, self._held, self._config.repetition_penalty)
        chosen = sample(logits, self._config, self._generator)
        self._held.scatter_(1, chosen[:, None], True)
        return chosen


def _send_to_cpu(token: Tensor) -> Callable[[], Tensor]:
    """Start a copy; the returned function waits for it, not for work queued later."""
    if not token.is_cuda:
        return token.cpu
    copy = token.to("cpu", non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(token.device))

    def arrive() -> Tensor:
        done.synchronize()
        return copy

    return arrive


def penalize(logits: Tensor, held: Tensor, penalty: float) -> Tensor:
    """Logits [B, V] after the repetition penalty of CTRL (arXiv 1909.05858), float32.

    CTRL divides the logits of tokens that a text holds. That would make one below 0 more likely, so
    here, as in Transformers, such a one is multiplied.

    Args:
        logits: [B, V].
        held: [B, V] bool, the tokens that each text holds.
        penalty: 1 changes nothing.
    """
    logits = logits.float()
    return torch.where(held, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def sample(logits: Tensor, config: SamplingConfig, generator: torch.Generator) -> Tensor:
    """Sample one token per row from logits [B, V], independently; return int64 [B].

    Every row has the same noise: that of a generator of its own with the same seed.
    """
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
    noise = torch.empty_like(probabilities[:1]).exponential_(generator=generator)
    return (probabilities / noise).argmax(dim=-1)


def _keep_nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Nucleus sampling (arXiv 1904.09751): drop tokens after the first top_p of the mass."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    # A token stays if the mass before it is below top_p, so the likeliest always stays.
    dropped = probabilities.cumsum(dim=-1) - probabilities >= top_p
    return logits.masked_fill(dropped.gather(-1, order.argsort(dim=-1)), -torch.inf)
