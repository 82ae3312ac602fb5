"""launch/ with tensor parallelism and with a pipeline: the same training as by data parallelism alone."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import prepare
import pytest
import torch
from gradmix_pretrain import checkpoint, pipeline
from gradmix_pretrain.settings import check, parse_args
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.documents import commands
from tests.support.pretraining import pretrain
from tests.support.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"

SEED = 7
LENGTH = 16
VOCAB = 300
STEPS = 4
MODEL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
}
PARALLEL = {"tensor": ["--tensor-parallel", "2"], "pipeline": ["--pipeline-stages", "2"]}


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False, "attention_bias": True}),
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("qwen3", {"head_dim": 4}),
    ],
)
def test_layers_compute_what_the_model_does(model_type: str, extra: dict[str, Any]) -> None:
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **MODEL, **extra))
    layers = pipeline.Layers(model)
    ids_BT = torch.randint(VOCAB, (2, LENGTH))
    logits_BTV = layers.forward(ids_BT)
    expected = model(input_ids=ids_BT, labels=ids_BT, use_cache=False)
    # Float32 rounding, should a kernel add in another order; here they are the same kernels.
    torch.testing.assert_close(logits_BTV, expected.logits, rtol=1e-6, atol=1e-6)
    loss = layers.loss(logits_BTV, ids_BT)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=0.0)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, wanted in zip(
        gradients, torch.autograd.grad(expected.loss, list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("granite", {"embedding_multiplier": 3.0}),
        ("granite", {"logits_scaling": 2.0}),
        ("gemma2", {}),  # caps its logits
        ("mixtral", {"output_router_logits": True}),  # adds to the loss
    ],
)
def test_a_model_with_more_to_it_is_refused(model_type: str, extra: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **MODEL, **extra))
    with pytest.raises(ValueError, match=f"model_type '{model_type}' computes something else") as mistake:
        pipeline.Layers(model)
    assert "\n" not in str(mistake.value)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Options for a small model with tied embeddings on a few thousand tokens, fp32 and ZeRO-1."""
    folder = tmp_path_factory.mktemp("inputs")
    generator = np.random.default_rng(SEED)
    (folder / "text").mkdir()
    for number in range(8):
        lines = [" ".join(generator.choice(["alpha", "beta", "gamma", "delta"], 8)) for _ in range(40)]
        (folder / "text" / f"{number}.txt").write_text("\n".join(lines) + "\n")
    data, text = str(folder / "data"), str(folder / "text")
    prepare.main(["--out", data, "--corpus", text, "--vocab-size", str(VOCAB)])
    model = {"model_type": "llama", "tie_word_embeddings": True, **MODEL}
    (folder / "model.json").write_text(json.dumps(model))
    (folder / "ds_config.json").write_text(json.dumps(ds_config()))
    return {
        "--deepspeed_config": str(folder / "ds_config.json"),
        "--model": str(folder / "model.json"),
        "--data": data,
        "--steps": str(STEPS),
    }


def ds_config(**changes: Any) -> dict[str, Any]:
    config = json.loads((ROOT / "configs" / "gaf_zero1.json").read_text())
    del config["gradmix"], config["bf16"]
    return {**config, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, **changes}


def as_arguments(options: dict[str, str]) -> list[str]:
    return [part for option in options.items() for part in option]


ZERO_0 = {"zero_optimization": {"stage": 0}}
ZERO_2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("options", "changes", "said"),
    [
        ("--tensor-parallel 3", {}, "--tensor-parallel 3 does not divide the number of ranks, 4"),
        ("--tensor-parallel 0", {}, "--tensor-parallel 0 does not divide"),
        ("--pipeline-stages 3", {}, "--pipeline-stages 3 does not divide the number of ranks, 4"),
        ("--pipeline-stages 2 --tensor-parallel 2", {}, "give one of both"),
        ("--pipeline-stages 2", {"tensor_parallel": {"autotp_size": 2}}, "give one of both"),
        ("--pipeline-stages 2", ZERO_2, "needs zero_optimization.stage 0 or 1, but .* has 2"),
        ("--pipeline-stages 2", ZERO_0, "take stage 1, or gradient_clipping 0"),
        ("--pipeline-stages 4", {}, "more than the 3 layers"),
        ("--tensor-parallel 4", {"tensor_parallel": {"autotp_size": 2}}, "contradicts .*autotp_size 2"),
        ("--tensor-parallel 2", {"train_batch_size": 8}, "would count every rank as a replica"),
    ],
)
def test_mistakes_are_found_before_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    inputs: dict[str, str],
    options: str,
    changes: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    (tmp_path / "ds_config.json").write_text(json.dumps(ds_config(**changes)))
    given = {**inputs, "--out": str(tmp_path), "--deepspeed_config": str(tmp_path / "ds_config.json")}
    with pytest.raises(ValueError, match=said) as mistake:
        check(parse_args([*as_arguments(given), *options.split()]))
    assert "\n" not in str(mistake.value)


def test_a_model_without_the_parts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "model.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": VOCAB}))
    given = {**inputs, "--out": str(tmp_path), "--model": str(tmp_path / "model.json")}
    with pytest.raises(ValueError, match=r"has no transformer.embed_tokens, no transformer.layers"):
        check(parse_args([*as_arguments(given), "--pipeline-stages", "2"]))


def test_the_configuration_names_the_degree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    (tmp_path / "ds_config.json").write_text(json.dumps(ds_config(tensor_parallel={"autotp_size": 4})))
    given = {**inputs, "--out": str(tmp_path), "--deepspeed_config": str(tmp_path / "ds_config.json")}
    for extra in ([], ["--tensor-parallel", "4"]):
        assert check(parse_args([*as_arguments(given), *extra])).tensor_parallel == 4
    found = check(parse_args([*as_arguments({**inputs, "--out": str(tmp_path)}), "--tensor-parallel", "2"]))
    assert found.ds_config["tensor_parallel"] == {"autotp_size": 2}


def test_a_run_keeps_its_degrees(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "latest").write_text("global_step4")
    for begun, resumed, said in (
        ({}, {"tensor parallelism": 2}, "another tensor parallelism"),
        ({"number of pipeline stages": 2}, {"number of pipeline stages": 1}, "another number of pipeline"),
    ):
        (tmp_path / "run.json").write_text(json.dumps(begun))
        checkpoint.check_identity(tmp_path, begun)
        with pytest.raises(ValueError, match=said):
            checkpoint.check_identity(tmp_path, resumed)


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def arguments(inputs: dict[str, str]) -> list[str]:
    return [*as_arguments(inputs), "--validate-every", "2", "--validation-windows", "8"]


@pytest.fixture(scope="module")
def by_data_parallelism(
    arguments: list[str], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What two replicas, a rank each, come to; from step 3 on the second reads the data of the first."""
    run = tmp_path_factory.mktemp("run")
    drill = ["--fault", "duplicate:rank=1:from=3"]
    assert run_ranks(2, pretrain, [*arguments, *drill, "--out", str(run)]) == [0, 0]
    return steps_of(run)


@pytest.mark.parametrize("kind", PARALLEL)
def test_two_replicas_of_two_ranks_train_as_two_of_one(
    tmp_path: Path, arguments: list[str], by_data_parallelism: list[dict[str, Any]], kind: str
) -> None:
    rank = {"tensor": 2, "pipeline": 1}[kind]  # of the second replica
    parallel = [*arguments, *PARALLEL[kind], "--fault", f"duplicate:rank={rank}:from=3"]
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    assert run_ranks(4, pretrain, [*parallel, "--out", str(undisturbed)]) == [0] * 4
    lines = steps_of(undisturbed)
    assert [line.keys() for line in lines] == [line.keys() for line in by_data_parallelism]
    for line, expected in zip(lines, by_data_parallelism, strict=True):
        # float32 sums in another order, amplified by the optimizer's division; measured: 1e-6
        assert line == pytest.approx(expected, rel=1e-5)

    assert run_ranks(4, pretrain, [*parallel, "--out", str(stopped)], 2) == [1] * 4
    assert checkpoint.latest_step(stopped / "checkpoint") == 2
    assert len(steps_of(stopped)) == 2
    assert run_ranks(4, pretrain, [*parallel, "--out", str(stopped)]) == [0] * 4
    assert steps_of(stopped) == lines  # not approximately


def test_documented_commands_train_with_rules(tmp_path: Path, inputs: dict[str, str]) -> None:
    """Those of docs/starting.md on 4 ranks, on less data and for 2 steps."""
    found = [shlex.split(line) for line in commands("docs/starting.md") if " launch/pretrain.py " in line]
    assert len(found) == 2
    for number, command in enumerate(found):
        script = command.index("launch/pretrain.py")
        assert command[:script] == ["deepspeed", "--num_accelerators", "4", "--module", "ds_gradmix"]
        run = tmp_path / str(number)
        fewer = ["--data", inputs["--data"], "--out", str(run), "--steps", "2", "--validation-windows", "8"]
        given = [str(ROOT / part) if part.startswith("configs/") else part for part in command[script + 1 :]]
        assert run_ranks(4, pretrain, [*given, *fewer], None, True) == [0] * 4
        lines = steps_of(run)
        assert lines[-1]["val_loss"] < lines[0]["val_loss"]
        assert {"kept_fraction", "mean_cosine"} <= set(lines[-1])
