"""Process under torchrun that trains runs one after the other.

    torchrun --nproc-per-node 2 train_worker.py TASKS

TASKS is a pickle of (TrainConfig, folders of the token stores of rank 0 and of the other ranks).
If a run is refused, the error message of this rank is written to `{out}.refused-{rank}`.
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
    gc.freeze()  # every stage collects garbage, and imported modules are not garbage
    rank = int(os.environ["RANK"])
    for run, stores in pickle.loads(Path(sys.argv[1]).read_bytes()):
        try:
            fit(run, TokenStore.open(stores[min(rank, 1)]))
        except UserError as error:
            Path(f"{run.out}.refused-{rank}").write_text(str(error))


if __name__ == "__main__":
    main()
