"""Process under torchrun that measures the perplexity of a checkpoint.

    torchrun --nproc-per-node 2 perplexity_worker.py CHECKPOINT CACHE TEXT...

Scored windows are cached in the folder CACHE. Each rank writes its result to `rank_{rank}.json`.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.evaluation.perplexity import measure_perplexity
from tokengrow.evaluation.response_cache import ResponseCache
from tokengrow.evaluation.scoring import Scorer

dist.init_process_group("gloo")
checkpoint = load_checkpoint(sys.argv[1])
assert checkpoint.tokenizer
tokenizer = Tokenizer.from_json(checkpoint.tokenizer)
scorer, texts = Scorer(checkpoint.model.double()), sys.argv[3:]
with ResponseCache(Path(sys.argv[2])) as responses:
    perplexity = measure_perplexity(texts, tokenizer, scorer, stride=9, responses=responses)
Path(f"rank_{dist.get_rank()}.json").write_text(json.dumps(perplexity.to_dict()))
dist.destroy_process_group()
