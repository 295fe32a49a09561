"""Growth of parameter tokens: initialisation of new keys and values.

zero_key: zero keys, random values, tau kept. A zero key scores 0, adds nothing to the L2 norm, and
f(0) = 0, so the function is the same. Zero keys with zero values would never train, because the
gradient of each is a multiple of the other.

gram: random keys, zero values, tau recomputed. For every input, the norm of the new scores is c
times that of the old ones, with c² = (tau' / tau)² - 1. The norm grows by the factor by which tau
grows, so the function is the same under the published definition of tau.

published: random keys and values, as in a new model. This changes the function.

TokenFormer, arXiv 2410.23168, section 3.3 and appendix A; `docs/growing.md` has the arguments.

Shapes: `N` parameter tokens before, `M` appended, `D` input dim, `E` output dim.
"""

import torch
from torch import Tensor

from tokengrow.checkpoint.tensors import StateDict
from tokengrow.errors import UserError
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.tensors import generator_for, normal_like, pattention_name, role_and_part
from tokengrow.model.config import ROLES, ModelConfig
from tokengrow.model.tokenformer import INIT_STD, published_value_std


def token_tensors(config: ModelConfig) -> dict[str, str]:
    """Map the name of every parameter-token tensor of a model to its role."""
    return {
        pattention_name(layer, role, part): role
        for layer in range(config.layers)
        for role in ROLES
        for part in ("key", "value")
    }


def grow_tokens(
    state: StateDict, source: ModelConfig, target: ModelConfig, config: GrowthConfig, seed: int
) -> StateDict:
    """Append parameter tokens to the weights of every role that grows.

    Args:
        state: weights of the source, or some of them, on the CPU; not modified.
        source: config before.
        target: config after; differs only in `tokens`, and possibly in `tau`.
        config: `init` is the initialisation. For zero keys, `new_value_scale` is relative to the
            root mean square of the old values in the tensor.
        seed: seed of the random entries.

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
            is_key = part == "key"
            new = _gram_keys(old, count, ratio, generator) if is_key else old.new_zeros(shape)
        elif part == "key":
            new = old.new_zeros(shape)
        else:
            new = normal_like(old, shape, config.new_value_scale, generator)
        grown[name] = torch.cat((old, new))
    return grown


def grow_tokens_moments(
    moments: StateDict, source: ModelConfig, target: ModelConfig, config: GrowthConfig, power: int
) -> StateDict:
    """Append zero moments for the new tokens.

    The gradient of an old entry is the same after the growth, so its moments stay unchanged.

    Args:
        moments: one of Adam's moments, or some of its tensors, named like the weights; not
            modified.
        source: config before.
        target: config after; differs only in `tokens`, and possibly in `tau`.
        config: unused, because moments do not depend on the initialisation of new entries.
        power: power of the gradient in this moment; unused, because all moments follow one rule.
    """
    grown = dict(moments)
    for name, old in moments.items():
        role, _ = role_and_part(name)
        if role and (count := _appended(role, source, target)):
            grown[name] = torch.cat((old, old.new_zeros(count, old.shape[1])))
    return grown


def check_gram(source: ModelConfig, target: ModelConfig) -> None:
    """Raise an error if new keys cannot match the old ones with `growth.init=gram`.

    Raises:
        UserError: the activation does not allow it, or a role gets too few new tokens.
    """
    if source.activation != "l2_norm_gelu":
        raise UserError(
            "model.activation must be l2_norm_gelu for growth.init=gram, got "
            f"{source.activation}. Use growth=zero_key."
        )
    for role in ROLES:
        n, d_in, _ = source.role_shape(role)
        rank, count = min(n, d_in), _appended(role, source, target)
        before, after = getattr(source.tau, role), getattr(target.tau, role)
        if count and after <= before:
            raise UserError(
                f"model.tokens.{role} must be above {int(before**2)} for growth.init=gram, got "
                f"{n + count}, because tau.{role} must grow: it is {before:.4g}, and sqrt(N) is "
                f"{after:.4g}. Raise model.tokens.{role}, or use growth=zero_key."
            )
        if 0 < count < rank:
            raise UserError(
                f"model.tokens.{role} must be {n}, or at least {n + rank}, for growth.init=gram, "
                f"got {n + count}. It must append at least {rank} tokens, the rank of the old "
                "keys. Change it, or use growth=zero_key."
            )


def _appended(role: str, source: ModelConfig, target: ModelConfig) -> int:
    """Return the number of new tokens of a role."""
    before: int = getattr(source.tokens, role)
    after: int = getattr(target.tokens, role)
    return after - before


def _gram_keys(old: Tensor, count: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Return M new keys with K_newᵀ K_new = (ratio² - 1) Kᵀ K.

    For every input, the sum of squared new scores is then (ratio² - 1) times the old one. With
    K = Q R (reduced QR), every K_new = c P R with orthonormal columns P [M, rank] satisfies this.

    Args:
        old: K [N, D].
        count: M, at least min(N, D).
        ratio: tau' / tau.
        generator: source of P.
    """
    triangle = torch.linalg.qr(old.double(), mode="r").R  # [min(N, D), D]
    normal = torch.empty(count, len(triangle), dtype=torch.float64).normal_(generator=generator)
    columns = torch.linalg.qr(normal).Q
    keys: Tensor = (ratio**2 - 1) ** 0.5 * columns @ triangle
    return keys.to(old.dtype)
