"""What torchrun starts: measures a checkpoint's perplexity, and writes what this rank found."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.evaluation.perplexity import measure_perplexity
from tokengrow.evaluation.scoring import Scorer

dist.init_process_group("gloo")
checkpoint = load_checkpoint(sys.argv[1])
assert checkpoint.tokenizer
tokenizer = Tokenizer.from_json(checkpoint.tokenizer)
found = measure_perplexity(sys.argv[2:], tokenizer, Scorer(checkpoint.model.double()), stride=9)
Path(f"rank_{dist.get_rank()}.json").write_text(json.dumps(found.to_dict()))
dist.destroy_process_group()
