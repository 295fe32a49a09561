"""The published sizes, by name.

150m to 1.5b: the four released models (Pile, 2048 tokens of context, GPT-NeoX vocabulary padded to
50304). owt2-*: the two OpenWebText2 recipes of the published code. paper-*: the ladder of
arXiv 2410.23168, section 4.2, which grows by parameter tokens alone (the count for attention and
FFN).
"""

from tokengrow.errors import UserError
from tokengrow.model.config import ModelConfig, Tokens

PADDED_VOCABULARY = 50304

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


def preset(name: str) -> ModelConfig:
    """The config of a published size, with the published initialisation.

    Raises:
        UserError: a name that is not in `PRESETS`.
    """
    if name not in PRESETS:
        raise UserError(f"model.preset {name!r}: valid are {', '.join(PRESETS)}")
    layers, width, heads, attention, ffn, context = PRESETS[name]
    return ModelConfig(
        vocab_size=PADDED_VOCABULARY,
        context_length=context,
        layers=layers,
        width=width,
        heads=heads,
        tokens=Tokens(query=attention, key=attention, value=attention, output=attention, ffn=ffn),
        init="published",
    )
