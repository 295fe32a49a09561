"""The published sizes, by name.

150m to 1.5b: the four released models (Pile, 2048 tokens of context, GPT-NeoX vocabulary padded to
50304). owt2-*: the two OpenWebText2 recipes of the published code. paper-*: the ladder of
arXiv 2410.23168, section 4.2, which grows by parameter tokens alone.
"""

PADDED_VOCABULARY = 50304
"""The GPT-NeoX vocabulary of 50277, padded to a multiple of 128."""

# name: (layers, width, heads, parameter tokens of attention, of the FFN, context length)
PRESETS: dict[str, tuple[int, int, int, int, int, int]] = {
    "150m": (12, 768, 12, 768, 3072, 2048),
    "450m": (24, 1024, 16, 1024, 4096, 2048),
    "900m": (32, 1280, 16, 1280, 5120, 2048),
    "1.5b": (40, 1536, 16, 1536, 6144, 2048),
    "owt2-354m": (24, 1024, 16, 768, 3072, 1024),
    "owt2-757m": (24, 1024, 16, 1792, 7168, 1024),
    "paper-124m": (12, 768, 12, 576, 2304, 1024),
    "paper-354m": (12, 768, 12, 2140, 8560, 1024),
    "paper-757m": (12, 768, 12, 4850, 19400, 1024),
    "paper-1.4b": (12, 768, 12, 8620, 34480, 1024),
}
