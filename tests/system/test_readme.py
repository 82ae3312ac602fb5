"""The README's commands, block, table and links are true; its launcher commands are run by test_start.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ds_gradmix import rules
from ds_gradmix.config import GradmixConfig, parse_block

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_block_is_valid_and_so_is_its_check(tmp_path: Path) -> None:
    block = json.loads("{" + blocks("json")[0] + "}")
    parse_block(block["gradmix"])
    (tmp_path / "ds_config.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, **block}))
    commands = [line for line in "".join(blocks("bash")).splitlines() if line.startswith("ds_gradmix ")]
    assert len(commands) == 2
    for command in commands:
        path = Path(sys.executable).parent / "ds_gradmix"
        subprocess.run(
            [path, *command.split()[1:]], cwd=tmp_path, check=True, timeout=60, capture_output=True
        )


def test_make_targets_exist() -> None:
    for command in (line for line in "".join(blocks("bash")).splitlines() if line.startswith("make ")):
        done = subprocess.run(
            [*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr


def test_every_command_is_of_a_known_kind() -> None:
    kinds = {line.split()[0] for line in "".join(blocks("bash")).splitlines() if line}
    assert kinds == {"make", "deepspeed", "torchrun", "srun", "ds_gradmix"}  # else: write its test first


@pytest.mark.parametrize(
    "rule", [*rules.MIXING, *rules.SCALING, *rules.EXTRAPOLATION], ids=lambda rule: rule.__name__
)
def test_every_key_of_a_rule_is_in_the_table(rule: type) -> None:
    rows = [line for line in README.splitlines() if line.startswith("|") and f"({rule.__name__})" in line]
    for name, field in rule.model_fields.items():  # type: ignore[attr-defined]
        row = next((row for row in rows if re.search(rf"[`.]{name}`", row.split("|")[1])), None)
        assert row is not None, name
        assert f"`{json.dumps(field.default)}`" in row.split("|")[2], (name, row)
    assert f'"{rule.__name__}"' in README


def test_every_key_of_the_block_is_in_the_table() -> None:
    for name, field in GradmixConfig.model_fields.items():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}"))
        if name not in ("mixing", "scaling", "extrapolation"):
            assert f"`{json.dumps(field.default)}`" in row.split("|")[2], row


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
