"""Growth by parameter tokens: how new keys and values are born.

zero_key: zero keys and random values, tau kept. A zero key scores 0, adds nothing to the L2 norm,
and f(0) = 0, so the function is the same. Both zero would be a trap: the gradient of each is a
multiple of the other, and neither would ever move.

gram: random keys and zero values, tau recomputed. The new keys score every input, together, c times
as large as the old ones do, c² = (tau' / tau)² - 1; the norm grows by what tau grows by. So the
result is the same function under the published definition of tau.

published: keys and values as at the birth of a model. Another function.

TokenFormer, arXiv 2410.23168, section 3.3 and appendix A; `docs/growing.md` has the arguments.

Shapes: `N` parameter tokens before, `M` appended, `D` input dim, `E` output dim.
"""

import torch
from torch import Tensor

from tokengrow.errors import UserError
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.tensors import (
    State,
    drawn_like,
    generator_for,
    pattention_name,
    role_and_part,
)
from tokengrow.model.config import ROLES, ModelConfig
from tokengrow.model.tokenformer import INIT_STD, published_value_std


def token_tensors(config: ModelConfig) -> dict[str, str]:
    """Name of every parameter-token tensor of a model, to its role."""
    return {
        pattention_name(layer, role, part): role
        for layer in range(config.layers)
        for role in ROLES
        for part in ("key", "value")
    }


def append_tokens(
    state: State, source: ModelConfig, target: ModelConfig, config: GrowthConfig, seed: int
) -> State:
    """Appends parameter tokens to the weights of every role that grows.

    Args:
        state: weights of the source, or some of them, on the CPU; not modified.
        source: config before.
        target: config after; differs in `tokens`, and perhaps `tau`, alone.
        config: how they are born; for zero keys, `new_value_scale` is over the root mean square of
            the tensor's old values.
        seed: of what is random in them.

    Returns:
        The grown weights; tensors that do not grow are shared with `state`.
    """
    grown = dict(state)
    for name, old in state.items():
        role, part = role_and_part(name)
        if not role or not (count := _appended(role, source, target)):
            continue
        shape, generator = (count, old.shape[1]), generator_for(seed, name)
        if config.init == "published":
            std = INIT_STD if part == "key" else published_value_std(source)
            new = old.new_empty(shape).normal_(0.0, std, generator=generator)
        elif config.init == "gram":
            ratio = getattr(target.tau, role) / getattr(source.tau, role)
            new = _matched(old, count, ratio, generator) if part == "key" else old.new_zeros(shape)
        elif part == "key":
            new = old.new_zeros(shape)
        else:
            new = drawn_like(old, shape, config.new_value_scale, generator)
        grown[name] = torch.cat((old, new))
    return grown


def append_moments(
    moments: State, source: ModelConfig, target: ModelConfig, config: GrowthConfig, power: int
) -> State:
    """Zero moments for the appended tokens; the old entries' are exact as they are.

    The gradient of an old entry is the same after the growth, so its moments are too.

    Args:
        moments: one of Adam's moments, or some of its tensors, named like the weights; not
            modified.
        source: config before.
        target: config after; differs in `tokens`, and perhaps `tau`, alone.
        config: not used: moments do not depend on how new entries are born.
        power: of the gradient in this moment; here the rule is the same for all.
    """
    grown = dict(moments)
    for name, old in moments.items():
        role, _ = role_and_part(name)
        if role and (count := _appended(role, source, target)):
            grown[name] = torch.cat((old, old.new_zeros(count, old.shape[1])))
    return grown


def check_gram(source: ModelConfig, target: ModelConfig) -> None:
    """Refuses a growth whose new keys are too few to match the old ones.

    Raises:
        UserError: names the role, and how many tokens it needs.
    """
    if source.activation != "l2_norm_gelu":
        raise UserError(
            f"growth.init=gram is exact for model.activation=l2_norm_gelu alone, not for "
            f"{source.activation}: take growth.init=zero_key"
        )
    for role in ROLES:
        n, d_in, _ = source.role_shape(role)
        before, after = getattr(source.tau, role), getattr(target.tau, role)
        if _appended(role, source, target) and after <= before:
            raise UserError(
                f"growth.init=gram raises tau to sqrt(N), and tau.{role} is {before:.4g} already, "
                f"where model.tokens.{role} gives {after:.4g}: set it to more than "
                f"{int(before**2)}, or take growth.init=zero_key"
            )
        if 0 < (count := _appended(role, source, target)) < min(n, d_in):
            raise UserError(
                f"growth.init=gram appends at least {min(n, d_in)} tokens, the rank of the old "
                f"keys, and model.tokens.{role}: {n} -> {n + count} appends {count}: set it to "
                f"{n}, or to {n + min(n, d_in)} or more, or take growth.init=zero_key"
            )


def _appended(role: str, source: ModelConfig, target: ModelConfig) -> int:
    return getattr(target.tokens, role) - getattr(source.tokens, role)


def _matched(old: Tensor, count: int, ratio: float, generator: torch.Generator) -> Tensor:
    """M new keys with K_newᵀ K_new = (ratio² - 1) Kᵀ K, whatever the input a sum of squared scores.

    With K = Q R (reduced QR), any K_new = c P R with orthonormal columns P [M, rank] does it.

    Args:
        old: K [N, D].
        count: M, at least min(N, D).
        ratio: tau' / tau.
        generator: of P.
    """
    triangle = torch.linalg.qr(old.double(), mode="r").R  # [min(N, D), D]
    normal = torch.empty(count, len(triangle), dtype=torch.float64).normal_(generator=generator)
    columns = torch.linalg.qr(normal).Q
    return ((ratio**2 - 1) ** 0.5 * columns @ triangle).to(old.dtype)
