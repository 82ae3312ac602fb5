"""launch/: schedule, data order, metrics, checks, and a run through the `deepspeed` command killed twice."""

import json
import os
import signal
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import prepare
import pytest
from gradmix_pretrain import checkpoint, metrics
from gradmix_pretrain.schedule import cosine_with_warmup
from gradmix_pretrain.settings import check, parse_args
from gradmix_pretrain.tokens import TrainingWindows, validation_batches
from quickstart import environment, free_port

from ds_gradmix.telemetry.alarms import EXIT_STATUS
from tests.support.pretraining import stopped, undisturbed
from tests.support.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"

SEED = 7
LENGTH = 16
VOCAB = 300


def test_schedule_warms_up_then_falls_to_the_floor() -> None:
    factors = [cosine_with_warmup(step, warmup_steps=4, total_steps=20, floor=0.1) for step in range(25)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(later < earlier for earlier, later in pairwise(factors[4:21]))
    assert factors[12] == pytest.approx((1.0 + 0.1) / 2)
    assert factors[20:] == pytest.approx([0.1] * 5)


def windows(rank: int, world_size: int, batch_size: int = 2, accumulation_steps: int = 3) -> TrainingWindows:
    """Over 72 windows, of which each token tells the window it is in."""
    tokens_N = np.repeat(np.arange(72, dtype=np.uint16), LENGTH)
    return TrainingWindows(tokens_N, LENGTH, batch_size, accumulation_steps, rank, world_size, SEED)


def read(source: TrainingWindows, steps: range) -> list[int]:
    """Which windows a rank reads."""
    batches = [source.batch(step, micro) for step in steps for micro in range(source.accumulation_steps)]
    for batch_BT in batches:
        assert batch_BT.shape == (source.batch_size, LENGTH)
        assert (batch_BT == batch_BT[:, :1]).all()
    return [int(row[0]) for batch_BT in batches for row in batch_BT]


def test_ranks_read_every_window_once_per_epoch() -> None:
    steps_per_epoch = 72 // (2 * 3 * 4)
    for epoch in range(2):
        steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
        seen = [index for rank in range(4) for index in read(windows(rank, 4), steps)]
        assert sorted(seen) == list(range(72))
    assert read(windows(0, 4), range(0, 3)) != read(windows(0, 4), range(3, 6))


def test_a_resumed_rank_reads_on_where_it_stopped() -> None:
    uninterrupted = read(windows(1, 2), range(15))
    assert read(windows(1, 2), range(8)) + read(windows(1, 2), range(8, 15)) == uninterrupted


def test_global_batch_does_not_depend_on_the_number_of_ranks() -> None:
    four = {index for rank in range(4) for index in read(windows(rank, 4), range(1))}
    two = {index for rank in range(2) for index in read(windows(rank, 2, batch_size=4), range(1))}
    assert four == two


def test_validation_shares_are_disjoint_and_equal() -> None:
    tokens_N = np.repeat(np.arange(50, dtype=np.uint16), LENGTH)
    shares = [validation_batches(tokens_N, LENGTH, 2, 30, rank, 4) for rank in range(4)]
    assert [[batch.shape for batch in share] for share in shares] == [[(2, LENGTH)] * 3] * 4
    chosen = sorted(int(row[0]) for share in shares for batch_BT in share for row in batch_BT)
    assert len(set(chosen)) == 24
    assert chosen[0] == 0 and chosen[-1] >= 47  # spread over all of it
    assert (
        len(validation_batches(tokens_N[: 3 * LENGTH], LENGTH, 2, 30, 3, 4)) == 1
    )  # fewer than ranks: shared


def test_metrics_drop_what_is_past_the_checkpoint_and_cut_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    metrics.MetricsFile(path, last_step=2).write({"step": 3, "loss": float("nan"), "grad_norm": float("inf")})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": null, "grad_norm": null}\n'


@pytest.mark.parametrize("with_rules", [False, True])
def test_summary_is_drawn(tmp_path: Path, with_rules: bool) -> None:
    decided = {"kept_fraction": 0.75, "mean_cosine": -0.1, "too_large": 30.0} if with_rules else {}
    lines = [{"step": step, "loss": 8.0 / step, "skipped": step == 3, **decided} for step in (1, 2, 3)]
    lines[0]["val_loss"], lines[2]["loss"] = 8.0, None
    metrics.draw_summary(lines, tmp_path / "summary.png")
    assert (tmp_path / "summary.png").read_bytes()[1:4] == b"PNG"
    assert metrics.report(lines).endswith("first 8.0000 (step 1), last 8.0000 (step 1)")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Options for a model of a few thousand parameters on a few thousand tokens."""
    folder = tmp_path_factory.mktemp("inputs")
    generator = np.random.default_rng(SEED)
    (folder / "text").mkdir()
    for number in range(8):
        lines = [" ".join(generator.choice(["alpha", "beta", "gamma", "delta"], 8)) for _ in range(40)]
        (folder / "text" / f"{number}.txt").write_text("\n".join(lines) + "\n")
    data, text = str(folder / "data"), str(folder / "text")
    prepare.main(["--out", data, "--corpus", text, "--vocab-size", str(VOCAB)])
    model = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32}
    model |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": LENGTH}
    (folder / "model.json").write_text(json.dumps(model))
    ds_config = json.loads((ROOT / "configs" / "gaf_vrgd_zero2.json").read_text())
    ds_config |= {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    ds_config["gradmix"]["scaling"]["params"]["momentum"] = 0.9  # a state to resume
    (folder / "ds_config.json").write_text(json.dumps(ds_config))
    return {
        "--deepspeed_config": str(folder / "ds_config.json"),
        "--model": str(folder / "model.json"),
        "--data": data,
        "--steps": "12",
    }


def as_arguments(options: dict[str, str]) -> list[str]:
    return [part for option in options.items() for part in option]


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--model", "missing.json", "No such file"),
        ("--model", '{"model_type": "llamma"}', "llamma"),
        (
            "--model",
            '{"model_type": "llama", "vocab_size": 64}',
            f"vocab_size 64, but the tokens .* need {VOCAB}",
        ),
        ("--deepspeed_config", "missing.json", "No such file"),
        ("--deepspeed_config", '{"optimizer": ', "Expecting value"),
        ("--deepspeed_config", "[1]", "not a JSON object"),
        ("--deepspeed_config", "{}", 'no "optimizer"'),
        ("--data", "nowhere", "no folder made by prepare.py"),
        ("--steps", "0", "--steps 0 is less than 1"),
        ("--fault", "negative:rank=0:from=13", "from=13: from is a whole number, one of 1 to 12"),
        ("--sequence-length", "17", "17 is longer than the model's max_position_embeddings 16"),
    ],
)
def test_mistakes_are_found_before_training(
    tmp_path: Path, inputs: dict[str, str], option: str, value: str, said: str
) -> None:
    if value.startswith(("{", "[")):
        (tmp_path / "given.json").write_text(value)
        value = str(tmp_path / "given.json")
    args = parse_args(as_arguments({**inputs, "--out": str(tmp_path), option: value}))
    with pytest.raises(ValueError, match=said) as mistake:
        check(args)
    assert "\n" not in str(mistake.value)


def test_fp32_in_place_of_what_the_config_says(tmp_path: Path, inputs: dict[str, str]) -> None:
    arguments = as_arguments({**inputs, "--out": str(tmp_path)})
    assert check(parse_args(arguments)).ds_config["bf16"] == {"enabled": True}
    assert "bf16" not in check(parse_args([*arguments, "--fp32"])).ds_config


def test_a_run_folder_is_kept_to_one_run(tmp_path: Path) -> None:
    held = checkpoint.lock(tmp_path)
    with pytest.raises(ValueError, match="another process"):
        checkpoint.lock(tmp_path)
    held.close()
    checkpoint.lock(tmp_path).close()

    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "latest").write_text("global_step40")
    (tmp_path / "run.json").write_text(json.dumps({"tokens": "a", "seed": 1}))
    checkpoint.check_identity(tmp_path, {"tokens": "a", "seed": 1})
    with pytest.raises(ValueError, match="another tokens"):
        checkpoint.check_identity(tmp_path, {"tokens": "b", "seed": 1})


# Stands in for pretrain.py, and dies when every part of the second checkpoint is written, but `latest` still
# names the first.
SABOTEUR = """
import os, runpy, signal, sys
sys.path[0] = {launch!r}
from gradmix_pretrain import checkpoint

write_text = checkpoint.write_text
def dying(path, text):
    if path.name == "latest" and text == "global_step8":
        os.kill(os.getpid(), signal.SIGKILL)
    write_text(path, text)
checkpoint.write_text = dying
runpy.run_path({launch!r} + "/pretrain.py", run_name="__main__")
"""


def train(script: Path, options: dict[str, str], *more: str, ranks: int = 2) -> tuple[int, str]:
    """Ranks through the `deepspeed` command; its exit status and what it printed."""
    launcher = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    command = [*launcher, "--module", "ds_gradmix", str(script), *as_arguments(options), *more]
    return run(command, environment())


def run(command: list[str], variables: dict[str, str]) -> tuple[int, str]:
    process = subprocess.Popen(
        command,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the ranks it started, which are in its session
        raise
    return process.returncode, output


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_killed_and_resumed_training_equals_uninterrupted_training(
    tmp_path: Path, inputs: dict[str, str]
) -> None:
    """With a drill in between, which a resumed run goes on with."""
    options = {**inputs, "--checkpoint-every": "4", "--validate-every": "5", "--validation-windows": "8"}
    plain, broken, honest = (tmp_path / name for name in ("plain", "broken", "honest"))
    drill = ["--fault", "negative:rank=1:from=5:until=6", "--fault", "noise:rank=1:from=7:until=7"]
    run_ranks(2, undisturbed, [*as_arguments({**options, "--out": str(plain)}), *drill])
    run_ranks(2, undisturbed, as_arguments({**options, "--out": str(honest)}))
    check_drill(steps_of(plain), steps_of(honest))
    assert [path.name for path in sorted((plain / "checkpoint").glob("global_step*"))] == [
        "global_step12",
        "global_step8",
    ]

    script = tmp_path / "kill.py"
    script.write_text(SABOTEUR.format(launch=str(LAUNCH)))
    status, output = train(script, {**options, "--out": str(broken)}, *drill)
    assert status != 0, output
    assert checkpoint.latest_step(broken / "checkpoint") == 4, output
    assert steps_of(broken)[-1]["step"] == 8
    log, arguments = tmp_path / "log", [*as_arguments({**options, "--out": str(broken)}), *drill]
    assert run_ranks(2, stopped, arguments, 6, log) == [1, 1]
    output = log.read_text()
    assert checkpoint.latest_step(broken / "checkpoint") == 6, output
    assert steps_of(broken)[-1]["step"] == 6
    assert "stopped; the same command resumes" in output
    assert "step 5: fault negative:rank=1:from=5:until=6 begins\n" in output

    output, _ = run_ranks(2, undisturbed, [*as_arguments({**options, "--out": str(broken)}), *drill])
    assert [line for line in output.splitlines() if ": fault " in line] == [
        "step 7: fault noise:rank=1:from=7:until=7 begins",
        "step 8: fault noise:rank=1:from=7:until=7 has ended",
    ]
    lines = steps_of(broken)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["step"] for line in lines if "val_loss" in line] == [1, 5, 10, 12]
    assert lines[-1]["val_loss"] < lines[0]["val_loss"]
    # Not approximately: the same numbers in the same order, on the same machine.
    assert lines == steps_of(plain)
    assert {"kept_fraction", "mean_cosine", "mean_factor"} <= set(lines[-1])
    assert (broken / "summary.png").exists()
    first, last = lines[0]["val_loss"], lines[-1]["val_loss"]
    assert f"first {first:.4f} (step 1), last {last:.4f} (step 12)" in output


def check_drill(faulty: list[dict[str, Any]], honest: list[dict[str, Any]]) -> None:
    """From step 5 on rank 1 has gradients of the wrong sign, and nothing else is wrong before step 6."""
    assert faulty[:4] == honest[:4]
    first, expected = faulty[4], honest[4]
    assert first["loss"] == expected["loss"], "computed before that step changes the weights"
    assert first["mean_cosine"] == pytest.approx(-expected["mean_cosine"], rel=1e-6) and first["mean_cosine"]
    assert first["grad_norm"] != expected["grad_norm"]
    assert all(one["loss"] != other["loss"] for one, other in zip(faulty[5:], honest[5:], strict=True))


def test_the_sketch_of_the_ready_config(tmp_path: Path, inputs: dict[str, str]) -> None:
    """As it is, at a learning rate for a dozen steps."""
    mine = {"--deepspeed_config": str(ROOT / "configs" / "gaf_zero2.json"), "--out": str(tmp_path)}
    options = {**inputs, **mine, "--steps": "12", "--validate-every": "12", "--warmup-steps": "0"}
    run_ranks(2, undisturbed, as_arguments(options))
    lines = steps_of(tmp_path)
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 0.1
    assert {"close_calls", "kept_fraction", "mean_cosine"} <= set(lines[-1])


def test_an_alarm_ends_all_ranks_with_a_checkpoint(tmp_path: Path, inputs: dict[str, str]) -> None:
    """With the exit status that job scripts go by, and the worker's name; without the fault it goes on."""
    config, out = json.loads(Path(inputs["--deepspeed_config"]).read_text()), tmp_path / "run"
    telemetry = {"path": str(out / "gradmix.jsonl"), "every": 2}
    telemetry |= {"on_alarm": "stop", "checkpoint_dir": str(out / "checkpoint")}
    config["gradmix"] = {"mixing": {"type": "Guard"}, "nonfinite": "drop", "telemetry": telemetry}
    (tmp_path / "ds_config.json").write_text(json.dumps(config))
    mine = {"--deepspeed_config": str(tmp_path / "ds_config.json"), "--out": str(out), "--steps": "6"}
    options = {**inputs, **mine, "--validate-every": "6", "--validation-windows": "8"}
    status, output = train(LAUNCH / "pretrain.py", options, "--fault", "nan:rank=1:from=3", ranks=3)
    assert status == EXIT_STATUS, output
    host = socket.gethostname()
    assert f"step 4: rank 1 on {host} looks faulty since about step 3: not finite" in output
    assert "stopping with exit status 17" in output and checkpoint.latest_step(out / "checkpoint") == 4
    run_ranks(3, undisturbed, as_arguments(options))
    assert [line["step"] for line in steps_of(out)] == [1, 2, 3, 5, 6]  # the script had no time for the 4th
    told = [json.loads(line) for line in (out / "gradmix.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in told if line["kind"] == "step"}
    assert list(steps) == [2, 4, 6] and steps[4]["worker_kept"] == [1.0, 0.0, 1.0]
    assert steps[6]["worker_kept"] == [1.0] * 3 and steps[6]["noise_scale_tokens"] > 0
    (alarm,) = [line for line in told if line["kind"] == "event"]
    assert (alarm["event"], alarm["ranks"], alarm["host"]) == ("alarm", [1], host)


@pytest.mark.parametrize("config", ["vr_lamb_zero2", "vr_lars_zero1", "guard_zero2", "gaf_zero3"])
def test_ready_configs_train(tmp_path: Path, inputs: dict[str, str], config: str) -> None:
    """As they are; those of optimizers that know layers, and ZeRO-3, too."""
    mine = {"--deepspeed_config": str(ROOT / "configs" / f"{config}.json"), "--out": str(tmp_path)}
    options = {**inputs, **mine, "--steps": "12", "--validate-every": "12", "--warmup-steps": "0"}
    run_ranks(2, undisturbed, as_arguments(options))
    lines = steps_of(tmp_path)
    assert lines[-1]["val_loss"] < lines[0]["val_loss"] - 0.1
    assert not config.startswith("vr") or 0 < lines[-1]["mean_factor"] < 1


def test_one_process_without_ds_gradmix_and_without_a_launcher(
    tmp_path: Path, inputs: dict[str, str]
) -> None:
    script = tmp_path / "without.py"
    script.write_text(
        "import runpy, sys\n"
        "sys.modules['ds_gradmix'] = None  # as if it were not installed\n"
        f"sys.path[0] = {str(LAUNCH)!r}\n"
        f"runpy.run_path({str(LAUNCH / 'pretrain.py')!r}, run_name='__main__')\n"
    )
    options = {**inputs, "--steps": "3", "--out": str(tmp_path / "run")}
    variables = environment() | {"MASTER_PORT": str(free_port())}
    status, output = run(
        [sys.executable, str(script), *as_arguments(options), "--activation-checkpointing"], variables
    )
    assert status == 0, output
    lines = steps_of(tmp_path / "run")
    assert [sorted(line) for line in lines[1:2]] == [["grad_norm", "loss", "lr", "skipped", "step"]]
    assert [line["skipped"] for line in lines] == [False] * 3
