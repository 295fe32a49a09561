"""Baseline Transformer: the model of a TokenFormer, with linear layers in its blocks.

It is Pythia (arXiv 2304.01373) with one difference: attention and the feed-forward layer are
sequential, as in a TokenFormer, and not parallel. Linear layers have biases, norms have an affine,
and the feed-forward layer has 4 D channels after a GELU. Embedding and output head are tied or not.

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
"""Name of the architecture."""

NORMS = ("attention_norm", "ffn_norm", "final_norm")
"""Names of the modules whose weights start at 1."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(LanguageModelConfig):
    """Sizes of a Transformer. Derived sizes are filled in at construction.

    Raises:
        UserError: a size is invalid; the message names its key.
    """

    architecture: str = TRANSFORMER
    """Name of the architecture, always transformer."""
    mlp_width: int = 0
    """Channels of the feed-forward layer (F); 0 means 4 D."""
    tied: bool = True
    """Whether the embedding is also the output head; in Pythia it is not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.architecture == TRANSFORMER,
            f"model.architecture of a Transformer must be {TRANSFORMER}, "
            f"got {self.architecture!r}.",
        )
        require(self.mlp_width >= 0, f"model.mlp_width must be at least 0, got {self.mlp_width}.")
        object.__setattr__(self, "mlp_width", self.mlp_width or 4 * self.width)

    @classmethod
    def matching(cls, other: LanguageModelConfig) -> "TransformerConfig":
        """Return the config of a tied Transformer with the sizes of another model.

        The two models have the same vocabulary, context length, layers, width, heads and
        initialisation.

        Args:
            other: config of a model whose embedding is the output head, as in a TokenFormer.
        """
        shared = {item.name: getattr(other, item.name) for item in fields(LanguageModelConfig)}
        return cls(**shared)

    def num_parameters(self) -> int:
        """Return the number of parameters; a tied embedding counts once."""
        width, inner, mlp = self.width, self.inner_dim, self.mlp_width
        attention = 3 * inner * (width + 1) + width * (inner + 1)
        block = attention + mlp * (width + 1) + width * (mlp + 1) + 2 * 2 * width
        embeddings = self.vocab_size * width * (1 if self.tied else 2)
        return embeddings + self.layers * block + 2 * width

    def matmul_parameters(self) -> int:
        """Return P, the parameters that multiply every token: all except an untied embedding."""
        lookup_only = 0 if self.tied else self.vocab_size * self.width
        return self.num_parameters() - lookup_only


class LinearAttention(Attention):
    """Attention with linear projections; query, key and value share one layer."""

    output: nn.Linear

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.query_key_value = nn.Linear(config.width, 3 * config.inner_dim)
        self.output = nn.Linear(config.inner_dim, config.width)

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Return query, key and value [..., H C] of [..., D]."""
        projected: Tensor = self.query_key_value(x)
        return projected.chunk(3, dim=-1)


class MLP(nn.Module):
    """Feed-forward layer: D to F channels, GELU, and F to D channels."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output [..., D] of [..., D]."""
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class AffineNorm(nn.LayerNorm):
    """Layer norm whose weights may have a narrower dtype than its input, as FSDP2 gathers them."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm [..., D] of [..., D]."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class LinearBlock(Block):
    """Block of a Transformer."""

    attention: LinearAttention
    ffn: MLP

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.attention_norm = AffineNorm(config.width, eps=config.norm_eps)
        self.attention = LinearAttention(config, layer)
        self.ffn_norm = AffineNorm(config.width, eps=config.norm_eps)
        self.ffn = MLP(config)


class Transformer(LanguageModel):
    """Language model with linear layers."""

    config: TransformerConfig
    block_class = LinearBlock

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        if not config.tied:
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.init_weights()

    @property
    def head_weight(self) -> Tensor:
        """Weight of the output head [V, D]: that of the embedding, if the two are tied."""
        return self.embedding.weight if self.config.tied else self.head.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise all weights by the method `config.init`.

        | tensor | balanced | published |
        | --- | --- | --- |
        | embedding, output head | N(0, 0.02) | N(0, sqrt(2 / 5 D)) |
        | query, key, value, up | N(0, 1 / sqrt(D)) | N(0, sqrt(2 / 5 D)) |
        | output, down | 0 | N(0, 2 / L / sqrt(D)) |
        | biases | 0 | 0 |
        | norms | weight 1, bias 0 | weight 1, bias 0 |

        Balanced is the counterpart of a TokenFormer's: every channel after a norm starts with unit
        variance, and every block as the identity. Published is that of Pythia: small_init (Nguyen
        and Salazar, arXiv 1910.05895) and wang_init of GPT-NeoX.
        """
        config = self.config
        balanced = config.init == "balanced"
        small = math.sqrt(2 / (5 * config.width))
        input_std = 1 / math.sqrt(config.width) if balanced else small
        output_std = 0.0 if balanced else 2 / config.layers / math.sqrt(config.width)
        embedding_std = INIT_STD if balanced else small
        stds = {
            "embedding": embedding_std,
            "head": embedding_std,
            "output": output_std,
            "down": output_std,
        }
        for name, tensor in self.named_parameters():
            module = name.removesuffix(".weight").rpartition(".")[2]
            if tensor.dim() == 1:
                nn.init.constant_(tensor, float(module in NORMS))
            else:
                nn.init.normal_(tensor, 0.0, stds.get(module, input_std), generator)


def kernel_unsupported_reason(
    kernel: str, config: TransformerConfig, dtype: torch.dtype
) -> str | None:
    """Return why a kernel cannot compute a Transformer, or None if it is the default.

    Args:
        kernel: a name in `KERNELS`.
        config: config of the model.
        dtype: dtype of its matrix products.

    Returns:
        The end of a sentence that begins with the kernel.
    """
    if kernel == "auto":
        return None
    return "computes Pattention, which a Transformer does not have. Set kernel=auto."
