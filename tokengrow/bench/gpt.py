"""A plain GPT of a TokenFormer's layers, width and heads: the peer in speed.

The same embedding, attention, rotary positions, norms, head and loss; its projections are linear
and its feed-forward layer has 4 D channels behind a GELU. No biases.

Shapes: `B` batch, `T` sequence, `D` width, `H` heads, `C` head dim, `V` vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from tokengrow.kernels.loss import linear_cross_entropy
from tokengrow.model.config import ModelConfig
from tokengrow.model.rotary import rotary_table, rotate
from tokengrow.model.tokenformer import fastest_attention


class GPTBlock(nn.Module):
    """`x += attention(norm(x)); x += mlp(norm(x))`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.eps = config.heads, config.norm_eps
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        batch, length, width = x.shape
        projected = self.query_key_value(F.layer_norm(x, (width,), eps=self.eps))
        query, key, value = projected.view(batch, length, 3 * self.heads, -1).chunk(3, dim=2)
        positions = table[0].unsqueeze(1), table[1].unsqueeze(1)  # [T, 1, R]
        query, key = rotate(query, positions), rotate(key, positions)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))  # [B, H, T, C]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, (width,), eps=self.eps))))


class GPT(nn.Module):
    """A GPT beside a TokenFormer of this config."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(GPTBlock(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, eps=config.final_norm_eps)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of [B, T] ids in nats per token."""
        config = self.config
        table = rotary_table(
            0, ids.shape[1], config.rotary_channels, config.rotary_base, ids.device
        )
        x = self.embedding(ids)
        with fastest_attention():
            for block in self.blocks:
                x = block(x, table)
        x = self.final_norm(x)
        return linear_cross_entropy(x.flatten(0, 1), self.embedding.weight, targets.flatten())

    def flops_per_token(self) -> int:
        """Counted as `ModelConfig.flops_per_token` counts: 6 P + 6 L T D."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        config = self.config
        return 6 * parameters + 6 * config.layers * config.context_length * config.width
