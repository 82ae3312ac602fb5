"""launch/cluster: hosts of which one loses power; the batch script with stand-ins for Slurm; the document."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import prepare
import pytest
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.launcher import runner
from gradmix_pretrain import checkpoint, metrics
from gradmix_pretrain.faults import DEFAULT_SCALES, KINDS, Training, parse_fault
from gradmix_pretrain.settings import parse_args

from ds_gradmix.telemetry.alarms import EXIT_STATUS
from tests.support.cluster import ROOT, Node, cluster, why_no_cluster
from tests.support.pretraining import undisturbed
from tests.support.ranks import run_ranks

CLUSTER = ROOT / "launch" / "cluster"
DOCUMENT = (ROOT / "docs" / "cluster.md").read_text()
BIN = Path(sys.executable).parent
STEPS, CHECKPOINT_EVERY = 44, 20


def commands() -> list[str]:
    """Those of the document."""
    return "".join(re.findall(r"```bash\n(.*?)```", DOCUMENT, flags=re.DOTALL)).splitlines()


def command(begin: str) -> str:
    (found,) = [line for line in commands() if line.startswith(begin)]
    return found


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a user would write into settings.sh: here a model of a few thousand parameters, and all rules."""
    folder = tmp_path_factory.mktemp("inputs")
    words = np.random.default_rng(7).choice(["alpha", "beta", "gamma", "delta"], (8, 40, 8))
    (folder / "text").mkdir()
    for number, lines in enumerate(words):
        (folder / "text" / f"{number}.txt").write_text("".join(" ".join(line) + "\n" for line in lines))
    prepare.main(["--out", f"{folder}/data", "--corpus", f"{folder}/text", "--vocab-size", "300"])
    model = {"model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32}
    model |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    (folder / "model.json").write_text(json.dumps(model))
    config = json.loads((ROOT / "configs" / "gaf_vrgd_pastgradient_zero2.json").read_text())
    config["train_micro_batch_size_per_gpu"] = 2
    config["gradmix"]["scaling"]["params"]["momentum"] = 0.9
    config["gradmix"]["worker"] = 2  # a host
    assert config["gradmix"]["mixing"] == {"type": "GAF", "params": {"threshold": 1.0}}, "shuffled"
    (folder / "ds_config.json").write_text(json.dumps(config))
    return {
        "CONFIG": f"{folder}/ds_config.json",
        "MODEL": f"{folder}/model.json",
        "DATA": f"{folder}/data",
        "STEPS": str(STEPS),
        "CHECKPOINT_EVERY": str(CHECKPOINT_EVERY),
    }


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    if (missing := why_no_cluster()) is not None:
        pytest.skip(f"a cluster of network namespaces: {missing}")
    with cluster(2, tmp_path_factory.mktemp("cluster")) as booted:
        yield booted


def environment(*first_on_path: Path | str, **extra: str) -> dict[str, str]:
    path = os.pathsep.join(map(str, [*first_on_path, BIN, os.environ["PATH"]]))
    return {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **extra}


def on_nodes(nodes: list[Node], folder: Path, **settings: str) -> dict[str, str]:
    """The environment of the scripts: the example files, with 2 ranks a host, and seconds for minutes."""
    (folder / "hostfile").write_text((CLUSTER / "hostfile").read_text().replace("slots=8", "slots=2"))
    mine = f"DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nPYTHONPATH={ROOT}\nPATH={BIN}:$PATH\n"
    (folder / "env").write_text((CLUSTER / ".deepspeed_env").read_text() + mine)
    return environment(
        nodes[0].folder / "bin",
        HOSTFILE=f"{folder}/hostfile",
        DS_ENV_FILE=f"{folder}/env",
        PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=2 -o ServerAliveCountMax=3",
        GRACE_S="2",
        **settings,
    )


def arguments_of(settings: Mapping[str, str], run: Path) -> list[str]:
    """What settings.sh makes of them."""
    script = "source launch/cluster/settings.sh; printf '%s\\n' \"${TRAINING[@]:1}\""
    told = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env={**os.environ, **settings, "RUN": str(run)},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return told.stdout.splitlines()


def wait_for(
    happened: Callable[[], bool], what: str, process: subprocess.Popen[str], log: Path, timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert process.poll() is None, f"ended before {what}:\n{log.read_text()[-6000:]}"
        assert time.monotonic() < deadline, f"no {what}:\n{log.read_text()[-6000:]}"
        time.sleep(0.05)


def last_step(run: Path) -> int:
    lines = metrics.read_lines(run / "metrics.jsonl")
    return int(lines[-1]["step"]) if lines else 0


def differences(one: Any, other: Any, where: str) -> list[str]:
    """Where two checkpoints differ in a single bit."""
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        return [] if same else [where]
    if isinstance(one, dict):
        if list(one) != list(other):
            return [f"{where}: {list(one)} and {list(other)}"]
        return [found for key in one for found in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)}"]
        pairs = enumerate(zip(one, other, strict=True))
        return [found for i, pair in pairs for found in differences(*pair, f"{where}.{i}")]
    if hasattr(one, "__dict__"):
        return differences(vars(one), vars(other), where)
    return [] if one == other else [f"{where}: {one} and {other}"]


@pytest.mark.timeout(280)
def test_a_host_loses_power_and_training_goes_on_to_the_same_weights(
    nodes: list[Node], inputs: dict[str, str], tmp_path: Path
) -> None:
    """The document's loop runs the real launcher until it succeeds; only the host is booted for it."""
    run, plain, log = tmp_path / "run", tmp_path / "plain", tmp_path / "log"
    saved, ranks = run / "checkpoint", "ds_gradmix --local_rank"
    with log.open("w") as out:
        loop = subprocess.Popen(
            nodes[0].command(["bash", "-c", command("until ")]),
            env=on_nodes(nodes, tmp_path, **inputs, RUN=str(run)),
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        wait_for(lambda: last_step(run) > 0, "a first step", loop, log, 120)
        variables = nodes[1].run("sh", "-c", f"cat /proc/$(pgrep -of '[d]{ranks[1:]}')/environ").stdout
        wait_for(lambda: last_step(run) > CHECKPOINT_EVERY + 1, "steps past a checkpoint", loop, log, 60)
        nodes[1].lose_power()
        run_ranks(4, undisturbed, arguments_of(inputs, plain))
        left = ["pgrep", "-f", f"{ranks}|deepspeed.launcher"]
        wait_for(lambda: nodes[0].run(*left).returncode == 1, "end of the ranks left", loop, log, 40)
        assert checkpoint.latest_step(saved) == CHECKPOINT_EVERY < last_step(run) < STEPS
        nodes[1].boot()
        assert loop.wait(timeout=120) == 0, log.read_text()[-6000:]
    finally:
        loop.kill()
        loop.wait()

    told = log.read_text()
    assert "node2: ssh exited with exit code 255" in told
    assert told.count("ds_gradmix: active over 2 workers, each the mean of 2 replicas") == 2
    assert told.count(f"step {CHECKPOINT_EVERY}: checkpoint saved") == 1, "resumed, not begun again"
    environ = dict(line.split("=", 1) for line in variables.split("\0") if line)
    assert environ["GLOO_SOCKET_IFNAME"] == "eth0" and environ["MASTER_ADDR"] == nodes[0].host.address
    assert environ["PATH"].startswith(f"{BIN}:/"), "expanded on the host"
    assert (environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"]) == ("2", "0", "4")

    assert metrics.read_lines(run / "metrics.jsonl") == metrics.read_lines(plain / "metrics.jsonl")
    parts = sorted(path.name for path in (saved / f"global_step{STEPS}").glob("*.pt"))
    assert len(parts) == 1 + 4, parts  # the model, and each rank's optimizer and rules
    for part in parts:
        one, other = (
            torch.load(folder / "checkpoint" / f"global_step{STEPS}" / part, weights_only=False)
            for folder in (run, plain)
        )
        assert differences(one, other, part) == []


def fake_rank(node: Node, run: str, prelude: str = "") -> subprocess.Popen[str]:
    """A process with the command line of a rank."""
    name = f"python -m ds_gradmix --local_rank=0 launch/pretrain.py --out {run} --steps"
    script = f"{prelude} exec -a {shlex.quote(name)} sleep 60"
    return subprocess.Popen(node.command(["bash", "-c", script]), text=True)


@pytest.mark.timeout(60)
def test_stop_asks_the_ranks_of_its_run_and_then_kills_them(nodes: list[Node], tmp_path: Path) -> None:
    polite, deaf = fake_rank(nodes[0], "runs/a"), fake_rank(nodes[1], "runs/a", "trap '' TERM;")
    other = fake_rank(nodes[1], "runs/ab")
    try:
        while any(node.run("pgrep", "-f", "sleep|local_rank").returncode for node in nodes):
            time.sleep(0.05)
        stopped = nodes[0].run(
            *command("launch/cluster/stop.sh").split(), env=on_nodes(nodes, tmp_path, RUN="runs/a")
        )
        assert stopped.returncode == 0, stopped.stderr
        # nsenter ends as what it has started.
        assert (polite.wait(timeout=10), deaf.wait(timeout=10)) == (-signal.SIGTERM, -signal.SIGKILL)
        assert other.poll() is None
    finally:
        for process in (polite, deaf, other):
            process.kill()
            process.wait()


SBATCH = """#!/usr/bin/env bash
export SLURM_SUBMIT_DIR=$PWD SLURM_NTASKS=2 SLURM_CPUS_PER_TASK=1 SLURM_JOB_NODELIST='node[1-2]'
cp "$1" "$0.script"  # Slurm runs a copy
exec bash "$0.script"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$0.log"
if [[ $1 == show ]]; then printf '127.0.0.1\nnode2\n'; fi
"""
SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$0.log"
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST='node[1-2]' "$@" &
done
wait -n && wait -n
"""


def batch_job(folder: Path, srun: str, job: int, **settings: str) -> subprocess.CompletedProcess[str]:
    """The document's `sbatch`, where that, scontrol and srun are stand-ins; they leave logs beside them."""
    folder.mkdir()
    for name, script in {"sbatch": SBATCH, "scontrol": SCONTROL, "srun": srun}.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    (folder / "env").write_text("GLOO_SOCKET_IFNAME=lo\n")
    return subprocess.run(
        command("sbatch ").split(),
        cwd=ROOT,
        env=environment(folder, SLURM_JOB_ID=str(job), DS_ENV_FILE=f"{folder}/env", **settings),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def free_job() -> int:
    """A job number whose port is free."""
    for job in np.random.default_rng().permutation(20000):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", 20000 + int(job)))
            return int(job)
    raise AssertionError("no free port")


@pytest.mark.timeout(150)
def test_batch_script_trains(inputs: dict[str, str], tmp_path: Path) -> None:
    config = json.loads(Path(inputs["CONFIG"]).read_text())
    config["gradmix"]["worker"] = "rank"
    (tmp_path / "ds_config.json").write_text(json.dumps(config))
    settings = {**inputs, "CONFIG": f"{tmp_path}/ds_config.json", "STEPS": "3", "RUN": f"{tmp_path}/run"}
    settings["FAULTS"] = "tokens:rank=0:from=2:until=2 nan:rank=1:from=3"
    done = batch_job(tmp_path / "slurm", SRUN, free_job(), **settings)
    assert done.returncode == 0, done.stderr
    begins_and_ends = ["2: fault tokens:rank=0:from=2:until=2 begins"]
    begins_and_ends += [
        "3: fault tokens:rank=0:from=2:until=2 has ended",
        "3: fault nan:rank=1:from=3 begins",
    ]
    assert re.findall("step (.*: fault .*)", done.stderr) == begins_and_ends
    assert "active over 2 workers" in done.stderr and "run: complete: 3 steps" in done.stdout
    assert checkpoint.latest_step(tmp_path / "run" / "checkpoint") == 3
    (started,) = (tmp_path / "slurm" / "srun.log").read_text().splitlines()
    assert started.startswith(
        "srun --kill-on-bad-exit=1 --cpus-per-task=1 python -m ds_gradmix launch/pretrain.py"
    )
    assert (tmp_path / "slurm" / "scontrol.log").read_text() == "scontrol show hostnames node[1-2]\n"


@pytest.mark.parametrize(("saves", "status"), [(True, 9), (False, 9), (True, EXIT_STATUS)])
def test_batch_script_goes_back_into_the_queue_if_it_got_on(tmp_path: Path, saves: bool, status: int) -> None:
    """And not at an alarm, since it would run into the same worker again."""
    latest = tmp_path / "run" / "checkpoint" / "latest"
    latest.parent.mkdir(parents=True)
    latest.write_text("global_step20")
    srun = f"#!/bin/sh\n{f'echo global_step40 >{latest}' if saves else ''}\nexit {status}\n"
    done = batch_job(tmp_path / "slurm", srun, 7, RUN=f"{tmp_path}/run")
    assert done.returncode == status, done.stderr
    told = (tmp_path / "slurm" / "scontrol.log").read_text().splitlines()
    assert told[1:] == (["scontrol requeue 7"] if saves and status != EXIT_STATUS else [])


def test_start_script_hands_options_to_the_launcher(tmp_path: Path) -> None:
    """The document's are the launcher's, and do what it says to a hostfile like the example."""
    stub = tmp_path / "deepspeed"
    stub.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" >{tmp_path}/told\nexit 3\n")
    stub.chmod(0o755)
    options = re.findall(r"`(--\w+ [^` ]+)`", DOCUMENT)
    assert options == ["--num_nodes 127", "--exclude node7", "--master_addr 10.0.0.1"]
    all_hosts = [f"node{i + 1}" for i in range(128)]
    (tmp_path / "hostfile").write_text("# all\n" + "".join(f"{host} slots=8\n" for host in all_hosts))
    settings = environment(tmp_path, HOSTFILE=f"{tmp_path}/hostfile")
    for option, hosts in zip(
        options, (all_hosts[:-1], all_hosts[:6] + all_hosts[7:], all_hosts), strict=True
    ):
        start = [*command("launch/cluster/deepspeed.sh").split(), *option.split()]
        done = subprocess.run(start, cwd=ROOT, env=settings, capture_output=True, timeout=30)
        assert done.returncode == 3
        told = (tmp_path / "told").read_text().splitlines()
        args = runner.parse_args(told)
        assert args.module and args.user_script == "ds_gradmix" and args.user_args[0] == "launch/pretrain.py"
        pool = runner.fetch_hostfile(args.hostfile)
        active = runner.parse_inclusion_exclusion(pool, args.include, args.exclude)
        assert list(runner.apply_num_nodes_and_gpus(active, args.num_nodes, args.num_gpus)) == hosts


def test_the_loop_of_the_document_ends_at_an_alarm(tmp_path: Path) -> None:
    script = tmp_path / "launch" / "cluster" / "deepspeed.sh"
    script.parent.mkdir(parents=True)
    ends = f"[ -e again ] && exit {EXIT_STATUS}\n: >again\nexit 1\n"
    script.write_text(f"#!/bin/sh\necho x >>{tmp_path}/started\n{ends}")
    script.chmod(0o755)
    loop = command("until ").replace("sleep 5", "sleep 0")
    assert subprocess.run(["bash", "-c", loop], cwd=tmp_path, timeout=20, check=False).returncode == 0
    assert (tmp_path / "started").read_text() == "x\nx\n"


def test_the_drill_of_the_document(tmp_path: Path) -> None:
    """On the ranks of the example hostfile, for the steps of settings.sh."""
    stub = tmp_path / "deepspeed"
    stub.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" >{tmp_path}/told\n")
    stub.chmod(0o755)
    subprocess.run(["bash", "-c", command("FAULTS=")], cwd=ROOT, env=environment(tmp_path), check=True)
    told = runner.parse_args((tmp_path / "told").read_text().splitlines())
    args = parse_args(told.user_args[1:])
    assert args.out == Path("runs/drill")
    num_ranks = sum(runner.fetch_hostfile(str(ROOT / told.hostfile)).values())
    (fault,) = (parse_fault(text, Training(args.steps, num_ranks)) for text in args.fault)
    assert (fault.kind, fault.rank, fault.first, fault.last) == ("noise", 3, 100, 200)


def test_the_document_has_every_kind_of_fault_and_its_default() -> None:
    rows = DOCUMENT.split("| kind |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    kinds = [kind for row in rows for kind in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(kinds) == sorted(KINDS)
    (scaled,) = (row for row in rows if "`scale`" in row)
    assert re.findall(r"`scale=(\w+)`", scaled) == [DEFAULT_SCALES[kind] for kind in ("scale", "noise")]


WAITING = """#!/usr/bin/env bash
trap 'echo interrupted' INT  # pdsh would drop its hosts
{says}
until [[ -e {folder}/stopped ]]; do sleep 0.05; done
exit 7
"""


@pytest.mark.timeout(30)
@pytest.mark.parametrize("cause", ["Ctrl-C", "a host's failure"])
def test_start_script_stops_all_hosts(tmp_path: Path, cause: str) -> None:
    failure = (
        "echo -n 'node1: 5%| |'; echo 'pdsh@vm: node2: ssh exited with exit code 255'"  # in one line, too
    )
    says = "echo started" if cause == "Ctrl-C" else failure
    stubs = {"deepspeed": WAITING.format(says=says, folder=tmp_path)}
    stubs["pdsh"] = f'#!/bin/sh\necho "$@" >{tmp_path}/stopped\n'
    for name, script in stubs.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    start = subprocess.Popen(
        command("launch/cluster/deepspeed.sh"),
        cwd=ROOT,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Under nohup it is inherited as ignored, which a shell cannot undo.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert start.stdout is not None
    try:
        first = start.stdout.readline()
        if cause == "Ctrl-C":
            os.killpg(start.pid, signal.SIGINT)  # as a terminal does: to all in the foreground
        told, _ = start.communicate(timeout=20)
    finally:
        (tmp_path / "stopped").touch()
        start.kill()
    assert start.returncode != 0 and "interrupted" not in first + told
    assert "-w node1,node2 " in (tmp_path / "stopped").read_text()


def test_document_is_true() -> None:
    ran = {"launch/cluster/deepspeed.sh", "launch/cluster/stop.sh", "sbatch launch/cluster/pretrain.sbatch"}
    assert {line for line in commands() if not line.startswith(("until ", "FAULTS="))} == ran
    assert (CUDA_Accelerator().export_envs(), CPU_Accelerator().export_envs()) == (["NCCL"], [])
    passed_on = re.findall(r"`(\w+)`", DOCUMENT.split("those that begin with", 1)[1])
    assert set(passed_on[: len(runner.EXPORT_ENVS)]) == set(runner.EXPORT_ENVS)
    for line in (CLUSTER / ".deepspeed_env").read_text().splitlines():
        assert f"| `{line.split('=')[0]}` |" in DOCUMENT
        assert re.fullmatch(r"\w+=\S+", line), "neither comments nor empty lines"
