"""Starting scripts: by the real `deepspeed` and `torchrun`, by srun's environment, and directly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_gradmix.slurm import first_host, rank_environment
from tests.support.documents import blocks
from tests.support.documents import commands as commands_of
from tests.support.ranks import free_port

BIN = Path(sys.executable).parent
TELL = """
import json, os, pickle, sys
class Here:
    x: int = 0
assert Here.__annotations__["x"] is int  # compiled without anybody's __future__
pickle.loads(pickle.dumps(Here()))  # finds the class in __main__
rank = os.environ.get("RANK", "0")
told = dict(argv=sys.argv, name=__name__, file=__file__, cwd=os.getcwd(), path=sys.path[0],
            spec=str(__spec__), main=sys.modules["__main__"].__dict__ is globals(), rank=rank)
with open(f"told{rank}.json", "w") as out:
    json.dump(told, out)
import neighbour  # of the script, not of where it was started
sys.exit(int(sys.argv[-1]))
"""
TRAIN = """
import argparse, json, os, sys
import torch
from deepspeed import initialize  # long before anybody could have replaced it
import deepspeed
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)
deepspeed.add_config_arguments(parser)
args = parser.parse_args()
torch.manual_seed(0)
model = torch.nn.Linear(8, 8)
engine, *_ = initialize(args=args, model=model, model_parameters=model.parameters())
for step in range(2):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
    x = x.to(engine.module.weight.dtype)
    engine.backward(engine(x).square().mean())
    engine.step()
told = f"TRAINED {torch.distributed.get_rank()} {float(model.weight.detach().double().sum())}\\n"
os.write(1, told.encode())  # in one piece, since the other rank writes to the same pipe
"""


def environment(**extra: str) -> dict[str, str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **extra}


def run(*command: str, cwd: Path, timeout: int = 150, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "neighbour.py").touch()
    (tmp_path / "sub" / "tell.py").write_text(TELL)
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path


def told(folder: Path, ranks: int) -> list[Any]:
    return [json.loads((folder / f"told{rank}.json").read_text()) for rank in range(ranks)]


def test_deepspeed_starts_a_script_as_if_directly(scripts: Path) -> None:
    launcher = ["deepspeed", "--num_accelerators", "2"]
    for module in ([], ["--module", "ds_gradmix"]):
        done = run(
            *launcher, "--master_port", str(free_port()), *module, "sub/tell.py", "--x", "0", cwd=scripts
        )
        assert done.returncode == 0, done.stderr
        if not module:
            direct = told(scripts, 2)
    started = told(scripts, 2)
    assert started[1]["argv"] == ["sub/tell.py", "--local_rank=1", "--x", "0"]
    assert started == direct


def test_directly_and_exit_status(scripts: Path) -> None:
    for status in (0, 7):
        direct = run(sys.executable, "sub/tell.py", str(status), cwd=scripts)
        expected = told(scripts, 1)
        started = run(sys.executable, "-m", "ds_gradmix", "sub/tell.py", str(status), cwd=scripts)
        assert (direct.returncode, expected) == (status, expected)
        assert (started.returncode, told(scripts, 1)) == (status, expected), started.stderr
    (scripts / "broken.py").write_text("def f():\n    raise KeyError('lost')\nf()\n")
    broken = run(sys.executable, "-m", "ds_gradmix", "broken.py", cwd=scripts)
    assert broken.returncode == 1 and "KeyError: 'lost'" in broken.stderr
    assert 'broken.py", line 2, in f' in broken.stderr


def test_a_module_and_a_missing_script(scripts: Path) -> None:
    module = run(sys.executable, "-m", "ds_gradmix", "--local_rank=0", "-m", "sub.neighbour", cwd=scripts)
    assert module.returncode == 0, module.stderr
    missing = run(sys.executable, "-m", "ds_gradmix", "nothing.py", cwd=scripts)
    assert missing.returncode == 2 and "'nothing.py'" in missing.stderr and "Traceback" not in missing.stderr
    usage = run(sys.executable, "-m", "ds_gradmix", cwd=scripts)
    assert usage.returncode == 2 and "usage" in usage.stderr
    verb = run(sys.executable, "-m", "ds_gradmix", "check", "nothing.json", cwd=scripts)
    assert verb.returncode == 2 and "No such file" in verb.stderr


def config(folder: Path, block: Any) -> str:
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "gradmix": block,
    }
    (folder / "ds_config.json").write_text(json.dumps(settings))
    return "ds_config.json"


def sums(output: str) -> list[str]:
    return [line.split()[2] for line in output.splitlines() if line.startswith("TRAINED")]


def test_every_launcher_trains_alike(scripts: Path) -> None:
    """The commands are those of docs/starting.md, with a free port, and the config is the README's; srun is
    two processes that have a job step's variables.
    """
    shown, _ = blocks("README.md", "diff")
    settings = json.loads("\n".join(line[1:] for line in shown.text.splitlines() if line[0] in "+ "))
    (scripts / "ds_config.json").write_text(json.dumps(settings))
    lines = commands_of("docs/starting.md")
    commands = {line.split()[0]: line.split()[1:] for line in lines if "train.py --deep" in line}
    assert set(commands) == {"deepspeed", "torchrun", "srun"}
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())]
    by_deepspeed = run(*launcher, *commands["deepspeed"], cwd=scripts)
    assert "ds_gradmix: active over 2 workers" in by_deepspeed.stderr, by_deepspeed.stderr
    found = sums(by_deepspeed.stdout)
    assert len(found) == 2 and found[0] == found[1]
    # The same rule by its full name, in a module beside the script.
    (scripts / "own_rules.py").write_text("from ds_gradmix.rules import Guard\nclass Own(Guard):\n    pass\n")
    settings["gradmix"]["mixing"]["type"] = "own_rules:Own"
    (scripts / "ds_config.json").write_text(json.dumps(settings))
    by_torchrun = run("torchrun", "--master_port", str(free_port()), *commands["torchrun"], cwd=scripts)
    assert sums(by_torchrun.stdout) == found, by_torchrun.stderr
    assert "mixing own_rules:Own(max_norm_ratio=2.0" in by_torchrun.stderr
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_PORT": str(free_port())}
    tasks = [
        subprocess.Popen(
            commands["srun"],
            cwd=scripts,
            env=environment(**slurm, SLURM_PROCID=str(task), SLURM_LOCALID=str(task)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    by_srun = [task.communicate(timeout=120)[0] for task in tasks]
    assert sums("\n".join(by_srun)) == found


def test_a_mistake_ends_every_rank_with_one_message(scripts: Path) -> None:
    options = ["train.py", "--deepspeed_config", config(scripts, {"mixing": {"type": "GAFF"}})]
    launcher = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), "--log-dir", "logs"]
    run(*launcher, "--redirects", "3", "-m", "ds_gradmix", *options, cwd=scripts)
    errors = [path.read_text() for path in sorted(scripts.glob("logs/**/stderr.log"))]
    assert len(errors) == 2
    for error in errors:
        assert 'ds_gradmix: error: gradmix.mixing.type: is "GAFF"' in error and 'did you mean "GAF"?' in error
        assert "Traceback" not in error
    alone = run(sys.executable, "-m", "ds_gradmix", *options, cwd=scripts, **one_rank())
    assert alone.returncode == 1 and "Traceback" not in alone.stderr, alone.stderr


ONE_WITHOUT = """
import json, os, sys, time
import torch
import deepspeed
assert sys.excepthook is not sys.__excepthook__
deepspeed.init_distributed()
config = json.load(open("ds_config.json"))
if torch.distributed.get_rank() == 1:
    time.sleep(float(sys.argv[1]))
    del config["gradmix"]
model = torch.nn.Linear(8, 8)
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
print("BUILT")
"""


@pytest.mark.parametrize("late_s", ["0", "5"])
def test_a_rank_without_a_block_ends_every_rank(scripts: Path, late_s: str) -> None:
    """Also if it comes when the others no longer wait for what it announces, but in a collective."""
    config(scripts, {"mixing": {"type": "GAF"}})
    (scripts / "one_without.py").write_text(ONE_WITHOUT)
    launcher = ["torchrun", "--nproc_per_node", "3", "--master_port", str(free_port()), "--log-dir", "logs"]
    options = ["--redirects", "3", "-m", "ds_gradmix", "one_without.py", late_s]
    done = run(*launcher, *options, cwd=scripts, timeout=100, GRADMIX_PEER_TIMEOUT="2")
    assert done.returncode != 0
    errors = [path.read_text() for path in sorted(scripts.glob("logs/**/stderr.log"))]
    told = 'building the engine: rank 1 has no "gradmix" block, while others have one'
    assert len(errors) == 3 and all(told in error for error in errors), errors
    assert all(("only 2 of 3 ranks" in errors[rank]) == (late_s == "5") for rank in (0, 2))


def test_enable_leaves_the_exception_hook_alone(scripts: Path) -> None:
    hook = "import sys, ds_gradmix; hook = sys.excepthook; ds_gradmix.enable(); assert sys.excepthook is hook"
    done = run(sys.executable, "-c", hook, cwd=scripts)
    assert done.returncode == 0, done.stderr


def one_rank() -> dict[str, str]:
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def test_launch_inside_a_batch_shell_is_one_process(scripts: Path) -> None:
    """There SLURM_NTASKS is set, without a job step; in one, launch/ finds its ranks as `-m ds_gradmix`."""
    tell = (
        "import os; from gradmix_pretrain import settings; settings.set_process_environment();"
        " print(*(os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR')))"
    )
    launch = str(Path(__file__).parents[2] / "launch")
    shell = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    step = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "gpu[07-09]"}
    path = {"PYTHONPATH": os.pathsep.join([launch, os.environ.get("PYTHONPATH", "")])}
    for variables, expected in ((shell, "0 1 0 127.0.0.1"), (shell | step, "5 8 0 gpu07")):
        done = run(sys.executable, "-c", tell, cwd=scripts, **path, **variables)
        assert done.stdout.strip() == expected, done.stderr


def test_slurm_environment() -> None:
    step = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "7"}
    found = rank_environment({**step, "SLURM_STEP_NODELIST": "gpu[07-09,12],login1"})
    assert found == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "20007",
    }
    assert "MASTER_ADDR" not in rank_environment({**step, "MASTER_ADDR": "head"})
    assert rank_environment({**step, "RANK": "0"}) == {}
    assert rank_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == {}  # the batch script's own shell
    hosts = {"a": "a", "a,b": "a", "n[3,5]": "n3", "n[3-5]-ib,m": "n3-ib", "n-1[001-004]": "n-1001"}
    assert {nodes: first_host(nodes) for nodes in hosts} == hosts
