"""Limits of the Triton kernels, importable without Triton."""

import torch

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the Triton kernels support."""

MAX_GROUP = 3
"""Maximum layers in one fused call, G: query, key and value."""

MAX_DECODE_BATCH = 4
"""Maximum batch size of the decoding kernels, B.

Each row of a batch reads the weights from the L2 cache again, which is twice as fast as the memory.
From about here on, matrix products are faster.
"""

MAX_DECODE_WIDTH, MAX_DECODE_HEAD_DIM = 4096, 256
"""Maximum width and head dim of the decoding kernels: one program holds that many channels."""
