"""Short unique names of runs in a report."""

import re
from collections.abc import Sequence
from pathlib import Path

_ASSIGNMENT = re.compile(r"([^=,]+)=(.*?)(?=,[^=,]+=|$)")
"""Pattern of a key and its value in the name of a sweep job; a value may contain commas."""


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each run directory.

    Jobs of a sweep get the settings in which they differ. Names that are not unique are preceded by
    the names of their parent directories.
    """
    depth = 1
    parts = [folder.resolve().parts for folder in folders]
    while len({each[-depth:] for each in parts}) < len(set(parts)):
        depth += 1
    short = short_run_names([each[-1] for each in parts])
    return ["/".join((*each[-depth:-1], name)) for each, name in zip(parts, short, strict=True)]


def short_run_names(names: Sequence[str]) -> list[str]:
    """Return names of sweep jobs without the settings that all of them share.

    `arm=grown` and `arm=small` become `grown` and `small`. `optim.lr=1,model.layers=2` becomes
    `lr=1,layers=2` if `lr` and `layers` are each the end of one key only. The names do not change
    if they belong to one job, or if one of them does not consist of KEY=VALUE.
    """
    jobs = [dict(_ASSIGNMENT.findall(name)) for name in names]
    rebuilt = [",".join(f"{key}={value}" for key, value in job.items()) for job in jobs]
    if rebuilt != list(names) or len(set(names)) == 1:
        return list(names)
    keys = list(dict.fromkeys(key for job in jobs for key in job))
    differing = [key for key in keys if len({job.get(key) for job in jobs}) > 1]
    if len(differing) == 1 and all(differing[0] in job for job in jobs):
        return [job[differing[0]] for job in jobs]
    ends = [key.rpartition(".")[2] for key in differing]
    short_keys = {
        key: end if ends.count(end) == 1 else key for key, end in zip(differing, ends, strict=True)
    }
    return [
        ",".join(f"{short_keys[key]}={value}" for key, value in job.items() if key in short_keys)
        or name
        for job, name in zip(jobs, names, strict=True)
    ]
