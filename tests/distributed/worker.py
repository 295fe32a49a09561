"""One of several processes, under torchrun: trains runs one after the other.

    torchrun --nproc-per-node 2 worker.py TASKS

TASKS is a pickle of the folder of a token store and of a list of `TrainConfig`s. One that is
refused leaves what this rank was told in `{out}.refused-{rank}`.
"""

import os
import pickle
import sys
from pathlib import Path

from tokengrow.data.store import TokenStore
from tokengrow.errors import UserError
from tokengrow.training.fit import fit


def main() -> None:
    store, runs = pickle.loads(Path(sys.argv[1]).read_bytes())
    tokens = TokenStore.open(store)
    for run in runs:
        try:
            fit(run, tokens)
        except UserError as error:
            Path(f"{run.out}.refused-{os.environ['RANK']}").write_text(str(error))


if __name__ == "__main__":
    main()
