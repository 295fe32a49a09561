"""Growth by parameter tokens: zero keys, non-zero values, tau kept.

A zero key scores 0, adds nothing to the L2 norm, and f(0) = 0, so the function is the same. Both
zero would be a trap: the gradient of each is a multiple of the other, and neither would ever move.
TokenFormer, arXiv 2410.23168, section 3.3 and appendix A; `docs/growing.md` has the argument.

Shapes: `N` parameter tokens before, `M` appended, `E` output dim.
"""

import torch

from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.tensors import State, drawn_like, pattention_name
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
    state: State,
    source: ModelConfig,
    target: ModelConfig,
    config: GrowthConfig,
    generator: torch.Generator,
) -> State:
    """Appends parameter tokens to the weights of every role that grows.

    Args:
        state: weights of the source, on the CPU; not modified.
        source: config before.
        target: config after; differs in `tokens` alone.
        config: how they are born; `new_value_scale` is over the root mean square of the tensor's
            old values.
        generator: of the new values.

    Returns:
        The grown weights; tensors that do not grow are shared with `state`.
    """
    grown = dict(state)
    for name, role in token_tensors(source).items():
        old = state[name]
        count = getattr(target.tokens, role) - getattr(source.tokens, role)
        shape, is_key = (count, old.shape[1]), name.endswith("key_param_tokens")
        if config.init == "published":
            std = INIT_STD if is_key else published_value_std(source)
            new = old.new_empty(shape).normal_(0.0, std, generator=generator)
        elif is_key:
            new = old.new_zeros(shape)
        else:
            new = drawn_like(old, shape, config.new_value_scale, generator)
        grown[name] = torch.cat((old, new)) if count else old
    return grown


def append_moments(moments: State, source: ModelConfig, target: ModelConfig, power: int) -> State:
    """Zero moments for the appended tokens; the old entries' are exact as they are.

    The gradient of an old entry is the same after the growth, so its moments are too.

    Args:
        moments: one of Adam's moments, named like the weights; not modified.
        source: config before.
        target: config after; differs in `tokens` alone.
        power: of the gradient in this moment, 1 or 2; here the rule is the same for both.
    """
    grown = dict(moments)
    for name, role in token_tensors(source).items():
        count = getattr(target.tokens, role) - getattr(source.tokens, role)
        if count and name in moments:
            old = moments[name]
            grown[name] = torch.cat((old, old.new_zeros(count, old.shape[1])))
    return grown
