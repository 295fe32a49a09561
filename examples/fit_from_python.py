"""Train a ladder of two sizes with `fit`: the same run that `tokengrow train` starts."""

import sys
from dataclasses import replace

from rich.console import Console

from tokengrow import ModelConfig, ParameterTokens, TokenStore, TrainConfig, fit
from tokengrow.distributed.fabric import FabricConfig
from tokengrow.optim.config import OptimConfig
from tokengrow.training.config import StageConfig

store = TokenStore.open(sys.argv[1])  # written by `tokengrow data`
out, steps = sys.argv[2], int(sys.argv[3])

tokens = ParameterTokens(query=16, key=16, value=16, output=16, ffn=64)
small = ModelConfig(
    vocab_size=store.vocab_size, context_length=32, layers=2, width=64, heads=2, tokens=tokens
)
large = replace(small, tokens=replace(tokens, ffn=128), tau=small.tau)
optim = OptimConfig(lr=3e-3, warmup_steps=2)
config = TrainConfig(
    out=out,
    stages=(
        StageConfig(name="small", steps=steps, model=small, optim=optim),
        StageConfig(name="large", steps=steps, model=large, optim=replace(optim, enter="peak")),
    ),
    batch_size=8,
    micro_batch_size=8,
    validation_every=steps,
    validation_sequences=8,
    fabric=FabricConfig(accelerator="cpu"),
)
result = fit(config, store, Console())
for rung in result.state.rungs:
    print(f"{rung.name}: {rung.parameters:,} parameters, validation loss {rung.loss_end:.4f}")
print(result.checkpoint.folder)
