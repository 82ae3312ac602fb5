"""Slurm's variables, in the form that torch.distributed and DeepSpeed read."""

import re
from collections.abc import Mapping


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What `srun python script.py` lacks: the variables by which DeepSpeed finds its ranks, from Slurm's own.

    Empty where they are already there, or where there is no job step of several tasks (a batch script's own
    shell has SLURM_NTASKS too, but is one process). MASTER_ADDR is the first host of the step, MASTER_PORT a
    number of the job.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or "SLURM_PROCID" not in environment or int(tasks) < 2:
        return {}
    found = {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": tasks,
        "MASTER_ADDR": first_host(environment.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000),
    }
    return {name: value for name, value in found.items() if name not in environment}


def first_host(nodes: str) -> str:
    """The first of Slurm's host list: `gpu[07-09,12],login1` is `gpu07`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    return nodes if match is None else "".join(part or "" for part in match.groups())
