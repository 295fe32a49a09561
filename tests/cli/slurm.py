"""sbatch, srun and sacct of a Slurm with one node, as far as submitit asks them: this file under
each of these names.

sbatch runs its script, srun its command once for each process, with the variables by which Slurm
tells them who they are.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

JOB_ID = "12345"


def sbatch(script: str) -> None:
    """Starts the script, and leaves it running."""
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", Path(script).read_text(), re.MULTILINE))
    nodes, per_node = int(options["nodes"]), int(options["ntasks-per-node"])
    job = {
        "SLURM_JOB_ID": JOB_ID,
        "SLURM_JOB_NAME": options["job-name"],
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NODELIST": "localhost",
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(nodes * per_node),
        "SLURM_NTASKS_PER_NODE": str(per_node),
    }
    quiet = subprocess.DEVNULL
    subprocess.Popen(["bash", script], env=os.environ | job, stdout=quiet, stderr=quiet)
    print(f"Submitted batch job {JOB_ID}")


def srun(*words: str) -> int:
    """Runs the command behind the options in as many processes as the job has tasks."""
    command = words[words.index(sys.executable) :]
    processes = []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        step = {"SLURM_STEP_ID": "0", "SLURM_NODEID": "0"}
        step |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        output = words[words.index("--output") + 1].replace("%t", str(rank))
        path = Path(output.replace("%j", JOB_ID))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as log:
            started = subprocess.Popen(command, env=os.environ | step, stdout=log, stderr=log)
        processes.append(started)
    return max(process.wait() for process in processes)


def sacct(*_: str) -> None:
    """Knows of no job: submitit then waits for its result."""
    print("JobID|State|NodeList")


if __name__ == "__main__":
    name, *words = sys.argv[1:]
    sys.exit({"sbatch": sbatch, "srun": srun, "sacct": sacct}[name](*words))
