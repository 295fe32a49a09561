"""Decoding of one text: time per token, next to the time to read every weight once.

Shapes: `T` prompt.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tokengrow.bench.rows import Measurement
from tokengrow.bench.timing import (
    Timing,
    bandwidth,
    peak_memory,
    relative_error,
    reset_peak_memory,
    time_steps,
)
from tokengrow.errors import UserError
from tokengrow.generation.decoder import Decoder
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import KVCache, TokenFormer

PROMPT, CAPACITY = 64, 512
"""Tokens before the first that is timed, and the most of the text."""
REPEATS, STEPS = 8, 40
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest relative error of the logits of a step compared with a full forward pass."""

LIMIT = "weights read once"


@torch.no_grad()
def measure(
    cases: list[tuple[str, ModelConfig]], dtype: torch.dtype, device: torch.device
) -> Iterator[Measurement]:
    """Measure every decoder with every model, after the limit.

    Args:
        cases: name and model.
        dtype: of weights and cache.
        device: where.

    Raises:
        UserError: a way whose logits are off; no time of it is given.
    """
    speed = bandwidth(device)
    for name, config in cases:
        torch.manual_seed(0)
        with device:
            model = TokenFormer(config).to(dtype).eval()
        weights = sum(parameter.nbytes for parameter in model.parameters())
        limit = weights / speed * 1e3
        ids = torch.randint(config.vocab_size, (1, PROMPT), device=device)  # [1, T]
        timings = {LIMIT: (Timing(limit, limit, limit), 0.0, 0.0)}
        for way, decode in _ways(model).items():
            timings[way] = _measure(model, decode, ids, f"{name}, {way}")
        for way, (timing, error, peak) in timings.items():
            yield Measurement.on(
                device,
                timing,
                suite="decode",
                case=f"{name}, {PROMPT} to {CAPACITY} tokens",
                peer=way,
                dtype=str(dtype).removeprefix("torch."),
                against_limit=round(limit / timing.median, 3),
                peak_gb=round(peak, 2),
                error=float(f"{error:.1e}"),
            )


Decode = Callable[[Tensor], Callable[[Tensor], Tensor]]
"""Function from a prompt to a function from a token [1] to the logits [1, V] after it."""


def _ways(model: TokenFormer) -> dict[str, Decode]:
    weight = model.embedding.weight

    def forward(prompt: Tensor) -> Callable[[Tensor], Tensor]:
        cache = KVCache(model.config, 1, CAPACITY, weight.dtype, weight.device)
        model(prompt, cache)
        return lambda token: model(token[:, None], cache)[:, -1]

    def plain_graph(prompt: Tensor) -> Callable[[Tensor], Tensor]:
        model.set_kernel("reference")
        decoder = Decoder(model, 1, CAPACITY)
        model.set_kernel("auto")
        decoder.prefill(prompt)
        return decoder.step

    def tokengrow(prompt: Tensor) -> Callable[[Tensor], Tensor]:
        decoder = Decoder(model, 1, CAPACITY)
        decoder.prefill(prompt)
        return decoder.step

    ways: dict[str, Decode] = {"forward pass with a cache": forward, "tokengrow": tokengrow}
    if weight.is_cuda:
        ways = {"plain steps in a CUDA graph": plain_graph, **ways}
    return ways


def _measure(
    model: TokenFormer, decode: Decode, ids: Tensor, where: str
) -> tuple[Timing, float, float]:
    """Return the time per token, the error of the first logits, and peak memory in GB."""
    reset_peak_memory(ids.device)
    step = decode(ids[:, :-1])
    logits = step(ids[:, -1])
    error = relative_error(logits, model(ids)[:, -1])
    if not error <= TOLERANCE[logits.dtype]:
        raise UserError(f"{where}: a relative error of {error:.1e}: no time is given for it")
    token = logits.argmax(-1)

    def next_token() -> None:
        nonlocal token
        token = step(token).argmax(-1)

    return time_steps(next_token, ids.device, REPEATS, STEPS), error, peak_memory(ids.device)
