"""docs/megatron.md and launch/megatron: every command of the document is run.

Always with stand-ins for Megatron-DeepSpeed and for what would go to the network; and, where GRADMIX_MEGATRON
names a clone of it and its requirements are installed, with the real one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ds_gradmix.config import parse_block
from tests.support.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "megatron.md").read_text()
SCRIPT = ROOT / "launch" / "megatron" / "pretrain_gpt.sh"
CONFIG = json.loads((ROOT / "configs" / "megatron" / "gaf_zero1.json").read_text())
CLONE = os.environ.get("GRADMIX_MEGATRON", "")
DECIDED = re.compile(r"ds_gradmix: step (\d+): (.*)")

# What the document's commands touch of Megatron-DeepSpeed, and the least that trains.
STAND_IN = {
    "megatron/training.py": """
import math
from deepspeed.compression.compress import nothing
from megatron.model.vision.knn_monitor import nothing
import json
""",
    "megatron/model/transformer.py": """
key_layer = key_layer.view(2, -1)
other = other.view(2, -1)
""",
    "tools/preprocess_data.py": """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--input")
parser.add_argument("--output-prefix")
args = parser.parse_known_args()[0]
for line in open(args.input):
    assert json.loads(line)["text"]
for end in ("bin", "idx"):
    pathlib.Path(f"{args.output_prefix}_text_document.{end}").touch()
""",
    "pretrain_gpt.py": """
import argparse, json
import deepspeed
import torch
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would have to be compiled
parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("--train-iters", "--micro-batch-size", "--local_rank"):
    parser.add_argument(name, type=int)
parser.add_argument("--deepspeed_config")
args = parser.parse_known_args()[0]
config = json.load(open(args.deepspeed_config))
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.Adam(model.parameters())
engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
for _ in range(args.train_iters * engine.gradient_accumulation_steps()):
    x = torch.randn(args.micro_batch_size, 8, dtype=torch.bfloat16)
    engine.backward(engine(x).square().mean())
    engine.step()
""",
}
WORKED_AROUND = {
    "megatron/training.py": "\nimport math\nimport json\n",
    "megatron/model/transformer.py": "\nkey_layer = key_layer.reshape(2, -1)\nother = other.view(2, -1)\n",
}


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    folder = tmp_path / "stand-in"
    for name, text in STAND_IN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def commands() -> str:
    return "\n".join(re.findall(r"```bash\n(.*?)```", DOCUMENT, flags=re.DOTALL))


def environment(bin_folder: Path, **extra: str) -> dict[str, str]:
    path = os.pathsep.join([str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {
        key: value for key, value in os.environ.items() if key not in ("TP", "PP", "DP", "CONFIG", "SAVE")
    }
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "PORT": str(free_port()), **extra}


def follow_the_document(folder: Path, programs: dict[str, str], timeout: int) -> str:
    """Run all of the document's commands, in a folder that looks like the repository's root; the output."""
    (folder / "bin").mkdir()
    for name, text in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    for name in ("launch", "configs"):
        (folder / name).symlink_to(ROOT / name)
    done = subprocess.run(
        ["bash", "-ec", commands()],
        cwd=folder,
        env=environment(folder / "bin"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def test_every_command_of_the_document(tmp_path: Path, stand_in: Path) -> None:
    programs = {
        "git": f'[ "$1" != clone ] || {{ mkdir -p "$3"; cp -r {stand_in}/* "$3"; }}',
        "pip": "true",
        "deepspeed": f'echo "$@" >> {tmp_path}/started',
    }
    follow_the_document(tmp_path, programs, 120)
    for name, text in WORKED_AROUND.items():
        assert (tmp_path / "runs" / "Megatron-DeepSpeed" / name).read_text() == text
    without, pipeline, tensor = (tmp_path / "started").read_text().splitlines()
    for started, ranks, options in [
        (without, 2, "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1"),
        (pipeline, 4, "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 2"),
        (tensor, 4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 1"),
    ]:
        assert re.match(
            rf"--num_accelerators {ranks} .*--module ds_gradmix \S*/pretrain_gpt.py {options} ", started
        )
        assert "--micro-batch-size 2 --global-batch-size 4 " in started and "--zero-stage 1 --bf16" in started
        assert ("--no-pipeline-parallel" in started) == (started is without)
        (save,) = re.findall(r"--deepspeed_config (\S+)", started)
        config = json.loads((tmp_path / save).read_text())
        written = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 2, "steps_per_print": 1}
        assert config == {**CONFIG, **written}


def run_script(folder: Path, **values: str) -> subprocess.CompletedProcess[str]:
    for name in ("data.bin", "data.idx", "tokenizer.model"):
        (folder / name).touch()
    given = {"DATA": f"{folder}/data", "TOKENIZER": f"{folder}/tokenizer.model", "SAVE": f"{folder}/save"}
    given["MEGATRON"] = f"{folder}/stand-in"
    env = environment(folder, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", **{**given, **values})
    return subprocess.run(
        ["bash", SCRIPT], cwd=folder, env=env, capture_output=True, text=True, timeout=100, check=False
    )


def test_decisions_are_logged_as_the_document_shows(tmp_path: Path, stand_in: Path) -> None:
    done = run_script(tmp_path, GPUS="2", PP="0", MICRO_BATCH="2", GLOBAL_BATCH="8", STEPS="4", LOG_EVERY="2")
    assert done.returncode == 0, done.stderr
    assert "ds_gradmix: active over 2 workers, ZeRO-1" in done.stderr
    logged, shown = DECIDED.findall(done.stderr), DECIDED.findall(DOCUMENT)
    assert [step for step, _ in logged] == ["2", "4"] and len(shown) == 3

    def names(numbers: str) -> list[str]:
        return [number.split()[0] for number in numbers.split(", ")]

    assert all(names(numbers) == names(logged[0][1]) for _, numbers in shown)
    active = [line for line in DOCUMENT.splitlines() if "ds_gradmix: active" in line]
    assert len(active) == 2
    assert all(line.endswith(f"ZeRO-1: {parse_block(CONFIG['gradmix']).describe()}") for line in active)


def test_as_many_ranks_as_tp_pp_dp(tmp_path: Path, stand_in: Path) -> None:
    for values, ranks in (({"TP": "2", "PP": "2", "DP": "3"}, 12), ({"PP": "0", "DP": "2"}, 2), ({}, 8)):
        done = run_script(tmp_path, DRY_RUN="1", GLOBAL_BATCH="96", **values)
        assert done.stdout.startswith(f"deepspeed --num_accelerators {ranks} "), done.stderr


def test_several_nodes(tmp_path: Path, stand_in: Path) -> None:
    (tmp_path / "hosts").write_text("# two nodes\na slots=8\nb slots=8\n")
    done = run_script(
        tmp_path,
        HOSTFILE=f"{tmp_path}/hosts",
        TP="2",
        PP="4",
        GLOBAL_BATCH="8",
        EXTRA="--use-flash-attn-v2",
        DRY_RUN="1",
    )
    assert done.stdout.startswith(f"deepspeed --hostfile {tmp_path}/hosts "), done.stderr
    assert "--num_accelerators" not in done.stdout and " --use-flash-attn-v2 " in done.stdout


def test_zero_2_only_without_pipeline(tmp_path: Path, stand_in: Path) -> None:
    (tmp_path / "two.json").write_text(json.dumps({**CONFIG, "zero_optimization": {"stage": 2}}))
    values = {"CONFIG": f"{tmp_path}/two.json", "DRY_RUN": "1"}
    refused, done = run_script(tmp_path, **values), run_script(tmp_path, PP="0", **values)
    assert (
        refused.returncode == 2 and "ZeRO stage 2, and DeepSpeed's pipeline takes 0 and 1" in refused.stderr
    )
    assert "--zero-stage 2 --bf16" in done.stdout and not (tmp_path / "save").exists()


MISTAKES = {
    "tokenizer.model has no line like": {"HOSTFILE": "tokenizer.model"},
    "MEGATRON is not set": {"MEGATRON": ""},
    "elsewhere.bin does not exist": {"DATA": "elsewhere"},
    "hosts does not exist": {"HOSTFILE": "hosts"},
    'TP is "two"': {"TP": "two"},
    'PP is "-1"': {"PP": "-1"},
    "8 ranks cannot be divided into replicas of TP x PP = 3 x 1": {"TP": "3"},
    "8 ranks cannot be divided into replicas of TP x PP = 4 x 4": {"TP": "4", "PP": "4"},
    'DP is "0"': {"DP": "0"},
    "8 ranks are 4 replicas of TP x PP = 2 x 1; DP is 2": {"TP": "2", "DP": "2", "GPUS": "8"},
    "multiple of MICRO_BATCH x workers = 4 x 8": {"GLOBAL_BATCH": "48"},
    "tokenizer.model could not be read": {"CONFIG": "tokenizer.model"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told(tmp_path: Path, stand_in: Path, message: str) -> None:
    done = run_script(tmp_path, **MISTAKES[message])
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and "pretrain_gpt.sh: error:" in done.stderr.splitlines()[-1]


@pytest.mark.timeout(900)
@pytest.mark.skipif(not CLONE, reason="GRADMIX_MEGATRON is not set to a clone of Megatron-DeepSpeed")
def test_the_document_with_megatron_itself(tmp_path: Path) -> None:
    """Four minutes on two cores."""
    git = shutil.which("git")
    assert git is not None
    (packages,) = re.findall(r"pip install (.*)", commands().splitlines()[3])
    missing = [name for name in packages.split() if importlib.util.find_spec(name) is None]
    assert not missing, f"pip install {' '.join(missing)}"
    programs = {"git": f'[ "$1" != clone ] || set -- clone "{CLONE}" "$3"\nexec {git} "$@"', "pip": "true"}
    output = follow_the_document(tmp_path, programs, 850)
    clone = tmp_path / "runs" / "Megatron-DeepSpeed"
    edited = subprocess.run(
        ["git", "diff", "--name-only"], cwd=clone, capture_output=True, text=True, check=True
    )
    assert edited.stdout.split() == ["megatron/model/transformer.py", "megatron/training.py"]
    for workers in ("2 workers, ZeRO-1", "2 workers, pipeline of 2", "2 workers, tensor parallel 2"):
        assert output.count(f"ds_gradmix: active over {workers}") == 1, workers
    steps = [int(step) for step, _ in DECIDED.findall(output)]
    assert steps == [*range(1, 41)] * 3
    assert len(re.findall(r"iteration +40/ +40 .*lm loss: [67]\.", output)) == 3
