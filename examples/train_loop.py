"""Train a TokenFormer in a loop of your own, grow it in the middle, and generate text."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

import tokengrow as tg
from tokengrow.data.corpus import TextCorpus
from tokengrow.data.tokenizer import TokenizerConfig, train_tokenizer
from tokengrow.generation.sampling import SamplingConfig
from tokengrow.optim.config import OptimConfig

files, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])  # text files, new folder
corpus = TextCorpus(files=[files], validation_fraction=0.1)
tokenizer = train_tokenizer(TokenizerConfig(vocab_size=512), corpus)
store = tg.build_store(corpus, tokenizer, folder, progress=False)

tokens = tg.ParameterTokens(query=16, key=16, value=16, output=16, ffn=64)
sizes = {"vocab_size": 512, "context_length": 64, "layers": 2, "width": 64, "heads": 2}
config = tg.ModelConfig(**sizes, tokens=tokens)
model = tg.TokenFormer(config)
model.init_weights(torch.Generator().manual_seed(0))
optim = OptimConfig(lr=3e-3)
optimizer = tg.build_optimizer(model, optim)
sequences = store.sequences("train", config.context_length)
batches = iter(tg.train_loader(sequences, seed=0, batch_size=8, micro_batch_size=8))
for step in range(2 * steps):
    if step == steps:  # the grown model computes the same function, so the loss has no jump
        model, state = tg.grow(model, replace(config, tokens=replace(tokens, ffn=128)), optimizer)
        optimizer = tg.build_optimizer(model, optim, state)
    batch = next(batches)
    loss = model(batch[:, :-1], targets=batch[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}, {model.config.num_parameters():,} parameters")
text = tg.generate(model, [torch.tensor(tokenizer.encode("The "))], SamplingConfig())
print(tokenizer.decode(torch.cat(list(text)).tolist()))
