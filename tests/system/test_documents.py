"""Every command, config and piece of code in the documents is run, here or by the test that is named here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_gradmix
from ds_gradmix.cli import main
from ds_gradmix.config import parse_block
from ds_gradmix.engines.optimizer_section import optimizer_of
from tests.support.documents import ROOT, Block, blocks, commands
from tests.support.ranks import run_ranks

ELSEWHERE = {
    "docs/cluster.md": "test_cluster.py",
    "docs/megatron.md": "test_megatron_deepspeed.py",
    "docs/report.md": "test_report_page.py",
    "docs/scaling.md": "test_scaling.py",
    **{f"docs/{page}.md": "test_recipes.py" for page in ("huggingface", "accelerate", "trl", "lightning")},
}
# Commands of other documents, by what they begin with, and the tests that run them.
COMMANDS = {
    "make ": "test_make_has_the_targets",
    "ds_gradmix ": "test_verbs",
    "pip install .": "test_package.py",
    "deepspeed --module ds_gradmix train.py": "test_start.py",
    "torchrun ": "test_start.py",
    "srun ": "test_start.py",
    "deepspeed --num_accelerators 4 --module ds_gradmix launch/pretrain.py": "test_parallel.py",
    "python benchmarks/arithmetic.py": "test_arithmetic_is_measured",
    "python benchmarks/step_time.py": "test_step_times_are_measured",
    "python -m ds_gradmix check": "test_a_rule_of_ones_own",
    "python -m tests.support.documents": "test_generated_parts_are_written",
    "python -m pytest -m gpu": "test_gpu_tests_are_there",
}


def others() -> list[str]:
    """The documents whose commands this file accounts for."""
    return sorted({block.document for block in blocks()} - ELSEWHERE.keys())


def run(*command: str, cwd: Path = ROOT, timeout: int = 100) -> str:
    """Its output; an error unless it ends well."""
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("document", ELSEWHERE)
def test_other_tests_read_their_document(document: str) -> None:
    assert Path(document).name in (ROOT / "tests" / "system" / ELSEWHERE[document]).read_text()


def test_every_block_is_of_a_known_kind() -> None:
    kinds = {block.language for block in blocks()}
    assert kinds == {"bash", "json", "python", "diff", ""}
    assert {block.document for block in blocks(language="")} == {"docs/megatron.md"}  # a log


def test_every_command_has_a_test() -> None:
    used = set()
    for document in others():
        for command in commands(document):
            begins = [begin for begin in COMMANDS if command.startswith(begin)]
            assert len(begins) == 1, f"{document}: {command}"
            used |= {*begins}
    assert used == COMMANDS.keys()
    for test in set(COMMANDS.values()):
        assert (ROOT / "tests/system" / test).exists() if test.endswith(".py") else test in globals(), test


def chosen(begin: str) -> list[str]:
    """The commands that begin so."""
    found = [command for document in others() for command in commands(document) if command.startswith(begin)]
    return sorted(set(found))


def test_make_has_the_targets() -> None:
    """What they do is in CONTRIBUTING.md's `make test`, and in test_compare.py."""
    told = {command: run(*command.split(), "--dry-run") for command in chosen("make ")}
    assert "launch/quickstart.py" in told["make pretrain"] and "launch/compare.py" in told["make compare"]


@pytest.mark.parametrize("block", blocks(language="json"), ids=lambda block: block.document)
def test_json(block: Block) -> None:
    """Blocks of ds_config.json; those with the reader's own rules are for test_a_rule_of_ones_own."""
    if block.text.startswith("{"):  # a whole one
        parse_block(json.loads(block.text)["gradmix"])
        return
    config = json.loads("{" + block.text + "}")
    if block.document == "docs/optimizers.md":
        assert list(config) == ["optimizer"] and optimizer_of(config) is not None
        return
    assert list(config) == ["gradmix"]
    if block.document != "docs/adding-a-rule.md":
        parse_block(config["gradmix"])


def new_lines(diff: str) -> str:
    return "\n".join(line[1:] for line in diff.splitlines() if line[:1] in "+ ")


def test_the_change_that_the_readme_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its config is checked here, and trained with by its command in test_start.py."""
    config, command = (new_lines(block.text) for block in blocks("README.md", "diff"))
    (tmp_path / "ds_config.json").write_text(config)
    assert main(["check", str(tmp_path / "ds_config.json")]) == 0
    told = capsys.readouterr().out
    assert "Guard: max_norm_ratio 2.0" in told and "telemetry" in told
    assert command in commands("docs/starting.md")


def test_verbs(tmp_path: Path) -> None:
    """One after the other, each says which is the next."""
    (tmp_path / "ds_config.json").write_text('{"zero_optimization": {"stage": 2}}')
    found = commands("docs/starting.md")[-3:]
    assert sorted(found) == [command for command in chosen("ds_gradmix ") if "docs/" not in command]
    written, checked, environment = (run(*command.split(), cwd=tmp_path) for command in found)
    assert written.splitlines()[-1] == f"next: {found[1]}" == environment.splitlines()[-1]
    assert "GAF: threshold 0.97" in checked and "gradients sent" in checked
    assert checked.splitlines()[-1].removeprefix("next: ") in commands("docs/starting.md")
    assert re.search(r"deepspeed +\d", environment)


def test_generated_parts_are_written() -> None:
    """What is up to date stays as it is."""
    before = {path: path.read_text() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.*")]}
    (command,) = chosen("python -m tests.support.documents")
    run(sys.executable, *command.split()[1:])
    assert {path: path.read_text() for path in before} == before


def test_gpu_tests_are_there() -> None:
    """They run where there is a GPU."""
    assert chosen("python -m pytest -m gpu") == ["python -m pytest -m gpu"]
    assert "pytest.mark.gpu" in (ROOT / "tests" / "distributed" / "test_gpu.py").read_text()


def steps(folder: str, code: str) -> dict[str, float]:
    """On a rank: the code, and what the rules decided in its step."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    torch.manual_seed(torch.distributed.get_rank())
    scope: dict[str, Any] = {}
    exec(code, scope)
    return ds_gradmix.stats(scope["engine"])


CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 2},
}


def test_a_script_with_initialize_and_with_a_rule_of_ones_own(tmp_path: Path) -> None:
    """The code of starting.md, with the block of adding-a-rule.md, which imports that page's rules."""
    (code,) = (block.text for block in blocks("docs/starting.md", "python"))
    write_rules(tmp_path)
    for stats in run_ranks(2, steps, str(tmp_path), code):
        assert stats["kept_fraction"] == 1.0 and 0 < stats["mean_factor"] < 1


def write_rules(folder: Path) -> None:
    """The files of adding-a-rule.md, of which a block begins with its name, and its ds_config.json."""
    files: dict[str, str] = {}
    for block in blocks("docs/adding-a-rule.md", "python"):
        (name,) = re.findall(r"^# (\w+\.py)", block.text)
        files[name] = files.get(name, "") + block.text
    assert list(files) == ["my_rules.py", "test_my_rules.py"]
    for name, text in files.items():
        (folder / name).write_text(text)
    (block,) = blocks("docs/adding-a-rule.md", "json")
    (folder / "ds_config.json").write_text(json.dumps({**CONFIG, **json.loads("{" + block.text + "}")}))


def test_a_rule_of_ones_own(tmp_path: Path) -> None:
    """`check` in the rule's folder, and the rule's own tests."""
    write_rules(tmp_path)
    (command,) = chosen("python -m ds_gradmix check")
    assert "my_rules:SteadyClip: factor 1.5" in run(sys.executable, *command.split()[1:], cwd=tmp_path)
    told = run(
        sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", ".", cwd=tmp_path
    )
    assert "4 passed" in told


def test_combine_as_in_the_document() -> None:
    (block,) = blocks("docs/rules.md", "python")
    scope: dict[str, Any] = {}
    exec(block.text, scope)
    assert scope["info"]["weights"][7] == 0


def test_an_optimizer_without_deepspeed() -> None:
    (block,) = blocks("docs/optimizers.md", "python")
    scope: dict[str, Any] = {}
    exec(block.text, scope)
    assert scope["optimizer"].param_groups[0]["step"] == 1


def test_arithmetic_is_measured() -> None:
    (command,) = (command.split() for command in chosen("python benchmarks/arithmetic.py"))
    told = run(sys.executable, *command[1:], "--columns", "1000", "--rounds", "1")
    assert told.count("times copying the input") == 4 and told.count("Gram matrix ") == 4


def test_step_times_are_measured() -> None:
    commands = [command.split()[1:] for command in chosen("python benchmarks/step_time.py")]
    fewer = ["--width", "32", "--depth", "2", "--tokens", "8", "--rounds", "1", "--steps", "1"]
    extrapolation, told, telemetry = (run(sys.executable, *command, *fewer) for command in commands)
    assert "PastGradient / none" in extrapolation and "Guard / mean; step: median" in telemetry
    assert "ZeRO-2, fp32: Lamb / AdamW; step: median" in told and "LARS / AdamW" in told


def test_every_piece_of_code_is_run_above() -> None:
    ran = {"docs/starting.md", "docs/rules.md", "docs/adding-a-rule.md", "docs/optimizers.md"}
    ran |= {document for document, test in ELSEWHERE.items() if test == "test_recipes.py"}
    assert {block.document for block in blocks(language="python")} == ran
