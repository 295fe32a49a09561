"""A Transformer to hold a TokenFormer against: the same model with linear layers in its blocks.

Pythia's (arXiv 2304.01373), but for one thing: attention and the feed-forward layer come one after
the other, as in a TokenFormer, and not side by side. Linear layers have biases, norms an affine,
the feed-forward layer 4 D channels behind a GELU; embedding and output head are tied or not.

Shapes: `B` batch, `T` sequence, `D` width, `F` channels of the feed-forward layer, `H` heads, `C`
head dim, `L` layers, `V` vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokengrow.model.config import LanguageModelConfig, require
from tokengrow.model.tokenformer import INIT_STD, Attention, Block, LanguageModel

TRANSFORMER = "transformer"


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(LanguageModelConfig):
    """What a Transformer is. Derived sizes are numbers once the object exists.

    Raises:
        UserError: sizes that do not fit together, naming the key.
    """

    architecture: str = TRANSFORMER
    """transformer: what tells its config from that of a TokenFormer."""
    mlp_width: int = 0
    """F: channels of the feed-forward layer; 0 means 4 D."""
    tied: bool = True
    """Whether the embedding is the output head too; Pythia's is not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.architecture == TRANSFORMER,
            f"model.architecture of a Transformer must be {TRANSFORMER}, not {self.architecture!r}",
        )
        require(self.mlp_width >= 0, f"model.mlp_width must not be negative, not {self.mlp_width}")
        object.__setattr__(self, "mlp_width", self.mlp_width or 4 * self.width)

    @classmethod
    def beside(cls, other: LanguageModelConfig) -> "TransformerConfig":
        """A Transformer of the vocabulary, context, layers, width, heads and init of another model.

        Args:
            other: with the embedding as its output head, as a TokenFormer has.
        """
        shared = {item.name: getattr(other, item.name) for item in fields(LanguageModelConfig)}
        return cls(**shared)

    def num_parameters(self) -> int:
        """All parameters, a tied embedding counted once."""
        width, inner, mlp = self.width, self.inner_dim, self.mlp_width
        attention = 3 * inner * (width + 1) + width * (inner + 1)
        block = attention + mlp * (width + 1) + width * (mlp + 1) + 2 * 2 * width
        embeddings = self.vocab_size * width * (1 if self.tied else 2)
        return embeddings + self.layers * block + 2 * width

    def multiplied_parameters(self) -> int:
        """P, those that every token is multiplied by: all but an embedding that is not the head."""
        looked_up = 0 if self.tied else self.vocab_size * self.width
        return self.num_parameters() - looked_up


class LinearAttention(Attention):
    """With linear projections; those of query, key and value are one."""

    output: nn.Linear

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.query_key_value = nn.Linear(config.width, 3 * config.inner_dim)
        self.output = nn.Linear(config.inner_dim, config.width)

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Query, key and value [..., H C] of [..., D]."""
        return self.query_key_value(x).chunk(3, dim=-1)


class MLP(nn.Module):
    """D to F channels, GELU, and back."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.down(F.gelu(self.up(x)))


class AffineNorm(nn.LayerNorm):
    """A layer norm whose weights may be narrower than its input, as FSDP2 sends them around."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class LinearBlock(Block):
    """Of a Transformer."""

    attention: LinearAttention
    ffn: MLP

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.attention_norm = AffineNorm(config.width, eps=config.norm_eps)
        self.attention = LinearAttention(config, layer)
        self.ffn_norm = AffineNorm(config.width, eps=config.norm_eps)
        self.ffn = MLP(config)


class Transformer(LanguageModel):
    """The language model with linear layers."""

    config: TransformerConfig
    block = LinearBlock

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        if not config.tied:
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.init_weights()

    @property
    def head_weight(self) -> Tensor:
        """[V, D] of the output head: that of the embedding, where the two are tied."""
        return self.embedding.weight if self.config.tied else self.head.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draws all weights anew, in the way that `config.init` names.

        | tensor | balanced | published |
        | --- | --- | --- |
        | embedding, output head | N(0, 0.02) | N(0, sqrt(2 / 5 D)) |
        | query, key, value, up | N(0, 1 / sqrt(D)) | N(0, sqrt(2 / 5 D)) |
        | output, down | 0 | N(0, 2 / L / sqrt(D)) |
        | biases | 0 | 0 |
        | norms | weight 1, bias 0 | weight 1, bias 0 |

        Balanced is what a TokenFormer's is: unit variance of every channel behind a norm, and every
        block as the identity. Published is Pythia's: small_init (Nguyen and Salazar, arXiv
        1910.05895) and GPT-NeoX's wang_init.
        """
        config = self.config
        balanced = config.init == "balanced"
        small = math.sqrt(2 / (5 * config.width))
        reads = 1 / math.sqrt(config.width) if balanced else small
        writes = 0.0 if balanced else 2 / config.layers / math.sqrt(config.width)
        outside = INIT_STD if balanced else small
        for name, tensor in self.named_parameters():
            kind = name.removesuffix(".weight").rpartition(".")[2]
            if tensor.dim() == 1:
                nn.init.constant_(tensor, float(kind in NORMS))
            else:
                std = {"embedding": outside, "head": outside, "output": writes, "down": writes}
                nn.init.normal_(tensor, 0.0, std.get(kind, reads), generator)


NORMS = ("attention_norm", "ffn_norm", "final_norm")
"""Whose weights start at 1."""


def kernel_unsupported_reason(
    kernel: str, config: TransformerConfig, dtype: torch.dtype
) -> str | None:
    """Why a kernel cannot compute a Transformer; None: it can, as no kernel is asked for.

    Args:
        kernel: a name in `KERNELS`.
        config: the model's.
        dtype: of its matrix products.
    """
    if kernel == "auto":
        return None
    return "is of Pattention, which a Transformer has none of: leave it at auto"
