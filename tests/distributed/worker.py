"""One of several processes, under torchrun: trains runs one after the other.

    torchrun --nproc-per-node 2 worker.py TASKS

TASKS is a pickle of (TrainConfig, folders of token stores): that of rank 0, and that of the others.
A run that is refused leaves what this rank was told in `{out}.refused-{rank}`.
"""

import gc
import os
import pickle
import sys
from pathlib import Path

from tokengrow.data.store import TokenStore
from tokengrow.errors import UserError
from tokengrow.training.trainer import fit


def main() -> None:
    gc.freeze()  # every stage collects garbage, and what is imported is none
    rank = int(os.environ["RANK"])
    for run, stores in pickle.loads(Path(sys.argv[1]).read_bytes()):
        try:
            fit(run, TokenStore.open(stores[min(rank, 1)]))
        except UserError as error:
            Path(f"{run.out}.refused-{rank}").write_text(str(error))


if __name__ == "__main__":
    main()
