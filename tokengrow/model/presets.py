"""Published model sizes, by name.

150m to 1.5b are the four released models (Pile, context length 2048, GPT-NeoX vocabulary padded to
50304). owt2-* are the two OpenWebText2 recipes of the published code. paper-* are the ladder of
arXiv 2410.23168, section 4.2, which grows only by parameter tokens.
"""

from typing import NamedTuple

PADDED_VOCABULARY = 50304
"""Size of the GPT-NeoX vocabulary, 50277, padded to a multiple of 128."""


class Preset(NamedTuple):
    """Sizes of a published model."""

    layers: int
    """Transformer blocks."""
    width: int
    """Channels of the residual stream."""
    heads: int
    """Attention heads."""
    attention_tokens: int
    """Parameter tokens of query, key, value and output."""
    ffn_tokens: int
    """Parameter tokens of the feed-forward layer."""
    context_length: int
    """Tokens in a training sequence."""


PRESETS = {
    "150m": Preset(12, 768, 12, 768, 3072, 2048),
    "450m": Preset(24, 1024, 16, 1024, 4096, 2048),
    "900m": Preset(32, 1280, 16, 1280, 5120, 2048),
    "1.5b": Preset(40, 1536, 16, 1536, 6144, 2048),
    "owt2-354m": Preset(24, 1024, 16, 768, 3072, 1024),
    "owt2-757m": Preset(24, 1024, 16, 1792, 7168, 1024),
    "paper-124m": Preset(12, 768, 12, 576, 2304, 1024),
    "paper-354m": Preset(12, 768, 12, 2140, 8560, 1024),
    "paper-757m": Preset(12, 768, 12, 4850, 19400, 1024),
    "paper-1.4b": Preset(12, 768, 12, 8620, 34480, 1024),
}
"""Name of a published model to its sizes."""
