"""`make compare`: interrupted by Ctrl-C in its last run, resumed, and what it writes and says in the end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import compare
import prepare
import pytest
from gradmix_pretrain.checkpoint import latest_step

from tests.support.pretraining import LAUNCH, undisturbed
from tests.support.ranks import run_ranks

STEPS, GOOD_STEPS = 100, 20
ALARM = {"kind": "event", "event": "alarm", "step": 30, "ranks": [1]}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prepared data, a small model, and three of the four runs complete."""
    monkeypatch.setenv("RUN", str(tmp_path))
    (tmp_path / "text.txt").write_text("\n".join(f"{i} and {i * i} are {i + i * i}" for i in range(900)))
    data, text = str(tmp_path / "data"), str(tmp_path / "text.txt")
    prepare.main(["--out", data, "--corpus", text, "--vocab-size", "300"])
    model = {"model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32}
    model |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    (tmp_path / "model.json").write_text(json.dumps(model))
    for number, (rule, faulty) in enumerate(compare.RUNS[:-1]):
        folder = tmp_path / "compare" / compare.folder_of(rule, faulty)
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "checkpoint" / "latest").write_text(f"global_step{STEPS}")
        lines = [{"step": step, "val_loss": 6 + number - step / 100} for step in (1, 50, STEPS)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        told = [{**ALARM, "step": step} for step in (40, 50)] * faulty
        (folder / "gradmix.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    return tmp_path


def arguments(run: Path, steps: int = STEPS) -> list[str]:
    fewer = ["--workers", "2", "--steps", str(steps), "--good-steps", str(GOOD_STEPS)]
    return [*fewer, "--model", str(run / "model.json"), "--validation-windows", "8"]


def interrupted(run: Path) -> str:
    """Start the last run, send Ctrl-C to the script alone when it trains, and return what was printed."""
    metrics = run / "compare" / "guard_bad_worker" / "metrics.jsonl"
    command = [sys.executable, str(LAUNCH / "compare.py"), *arguments(run)]
    with (run / "output").open("w") as output:
        script = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and script.poll() is None:
            if metrics.exists() and metrics.read_text():
                break
            time.sleep(0.02)
        script.send_signal(signal.SIGINT)
        try:
            assert script.wait(timeout=60) != 0
        finally:
            script.terminate()
    return (run / "output").read_text()


def test_comparison(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    printed = interrupted(run)
    assert "run 4 of 4: Guard, one bad worker" in printed
    assert "stopped; the same command resumes" in printed, printed
    stopped_at = latest_step(run / "compare" / "guard_bad_worker" / "checkpoint")
    assert 0 < stopped_at < STEPS and not (run / "compare" / "compare.json").exists()

    started: list[Sequence[str]] = []

    def train(command: Sequence[str], variables: Mapping[str, str]) -> int:
        started.append(command)
        run_ranks(2, undisturbed, list(command[command.index("launch/pretrain.py") + 1 :]))
        return 0

    monkeypatch.setattr(compare, "train", train)
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments(run)])
    compare.main()
    (command,) = started
    assert command[command.index("--fault") + 1] == f"noise:scale=100:rank=1:from={GOOD_STEPS + 1}"
    results = json.loads((run / "compare" / "compare.json").read_text())
    losses = [[step for step, _ in found["val_loss"]] for found in results["runs"]]
    assert losses == [[1, 50, STEPS]] * 3 + [[1, *range(10, STEPS + 1, 10)]]
    assert [found["alarms"] for found in results["runs"]][:3] == [[], [], [[1, 40]]]
    assert results["parameters"] == 300 * 16 * 2 + 4 * 16 * 16 + 3 * 16 * 32 + 3 * 16
    check_words(results["runs"][-1]["val_loss"][-1][1], capsys.readouterr().out)
    assert "one worker breaks" in (run / "compare" / "compare.svg").read_text()

    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments(run, steps=50)])
    with pytest.raises(SystemExit, match="a comparison with other steps; remove it, or give another RUN"):
        compare.main()


def check_words(last_loss: float, printed: str) -> None:
    table = [line.split() for line in printed.splitlines() if line.startswith(("Mean ", "Guard "))]
    assert table == [["Mean", "5.00", "7.00"], ["Guard", "6.00", f"{last_loss:.2f}"]]
    assert "One of 2 workers breaks after 20 steps: its gradients become noise, 100 times as long" in printed
    assert printed.count("report.html") == 4
