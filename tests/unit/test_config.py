"""Mistakes in the block: path, value, what is allowed, the nearest name; and what cannot be combined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ds_gradmix
from ds_gradmix.cli import main
from ds_gradmix.config import ConfigError, for_stage, misspelt_key, parse_block
from ds_gradmix.engines.compatibility import REFUSALS, REFUSALS_OF_STAGE_3, refused_settings
from ds_gradmix.rules import MIXING

TYPES = ", ".join(f'"{rule.__name__}"' for rule in MIXING)
MISTAKES: list[tuple[Any, list[str]]] = [
    (5, ["gradmix: is 5", "an object"]),
    ({"mixing": "GAF"}, ["gradmix.mixing: is", '"GAF"', '{"type"']),
    ({"mixing": {}}, ["gradmix.mixing.type: is missing", TYPES]),
    ({"mixing": {"type": "GAFF"}}, ["gradmix.mixing.type", '"GAFF"', 'did you mean "GAF"?']),
    ({"mixing": {"type": 3}}, ["gradmix.mixing.type: is 3"]),
    ({"mixing": {"type": "GAF", "threshold": 1}}, ["gradmix.mixing.threshold", "gradmix.mixing.params"]),
    ({"mixing": {"type": "GAF", "params": 3}}, ["gradmix.mixing.params: is 3", "an object"]),
    (
        {"mixing": {"type": "GAF", "params": {"treshold": 1}}},
        ["params.treshold", 'did you mean "threshold"?'],
    ),
    ({"mixing": {"type": "GAF", "params": {"threshold": 2.5}}}, ["params.threshold: is 2.5", ">= 0", "<= 2"]),
    ({"mixing": {"type": "GAF", "params": {"threshold": "1.0"}}}, ['params.threshold: is "1.0"', "number"]),
    ({"mixing": {"type": "GAF", "params": {"threshold": True}}}, ["params.threshold: is true", "number"]),
    (
        {"mixing": {"type": "GAF", "params": {"merge": "median"}}},
        ['"mean" or "midpoint"', 'did you mean "mean"?'],
    ),
    ({"mixing": {"type": "GradientMix", "params": {"alpha": 0}}}, ["params.alpha: is 0", "> 0"]),
    (
        {"mixing": {"type": "GradientMix", "params": {"start_step": 9, "end_step": 9}}},
        ["gradmix.mixing.params", "end_step", "start_step (9)"],
    ),
    (
        {"scaling": {"type": "VRGD", "params": {"momentum": 1.0}}},
        ["gradmix.scaling.params.momentum: is 1.0", "< 1"],
    ),
    ({"scaling": {"type": "GAF"}}, ["gradmix.scaling.type", '"VRGD"']),
    ({"extrapolation": {"type": "Noise"}}, ["gradmix.extrapolation.params", "exactly one of std"]),
    ({"extrapolation": {"type": "pastgrad"}}, ["gradmix.extrapolation.type", 'did you mean "PastGradient"?']),
    ({"scope": "modle"}, ['gradmix.scope: is "modle"', 'did you mean "model"?']),
    ({"seed": -1}, ["gradmix.seed: is -1", ">= 0"]),
    ({"seed": 1.5}, ["gradmix.seed: is 1.5", "integer"]),
    ({"scoope": "model"}, ["gradmix.scoope: unknown key", 'did you mean "scope"?']),
    ({"tile_bytes": 0}, ["gradmix.tile_bytes: is 0", ">= 4096"]),
    ({"tile_bytes": 2**40 + 1}, ["gradmix.tile_bytes: is 1099511627777", "<= 1099511627776"]),
    ({"tile_bytes": 2**66}, ["gradmix.tile_bytes: is 73786976294838206464", "<= 1099511627776"]),
    ({"nonfinite": None}, ["gradmix.nonfinite: is null"]),
]


@pytest.mark.parametrize("block, words", MISTAKES, ids=lambda value: json.dumps(value)[:60])
def test_mistakes_are_told(block: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_block(block)
    for word in words:
        assert word in str(caught.value)


def test_all_mistakes_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_block(
            {"mixing": {"type": "GAF", "params": {"threshold": 3, "order": "x"}}, "seed": "a", "scal": 1}
        )
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize("worker", ["nodes", 0, -2, True, 2.0, None, [2]])
def test_a_mistaken_worker_is_told_once(worker: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_block({"worker": worker})
    assert len(str(caught.value).splitlines()) == 1
    assert 'allowed: "rank" or "node" or integer, >= 1 (default "rank")' in str(caught.value)
    assert str(caught.value).startswith("gradmix.worker: is ")
    assert ('did you mean "node"?' in str(caught.value)) == (worker == "nodes")


GRAM = '"exact" or {"sketch": integer, >= 8, <= 268435456} (default "exact")'


@pytest.mark.parametrize(
    "gram, line",
    [
        ("exakt", f'gradmix.gram: is "exakt"; allowed: {GRAM}; did you mean "exact"?'),
        (None, f"gradmix.gram: is null; allowed: {GRAM}; change it, or remove it for the default"),
        (64, f"gradmix.gram: is 64; allowed: {GRAM}; change it, or remove it for the default"),
        ({}, "gradmix.gram.sketch: is missing; allowed: integer, >= 8, <= 268435456; "),
        ({"sketch": 4}, "gradmix.gram.sketch: is 4; allowed: integer, >= 8, <= 268435456; "),
        ({"sketch": 1e6}, "gradmix.gram.sketch: is 1000000.0; allowed: integer, "),
        ({"sketch": 64, "seed": 1}, "gradmix.gram.seed: unknown key (value 1); allowed: sketch; remove it"),
    ],
)
def test_a_mistaken_gram_is_told_once(gram: Any, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_block({"mixing": {"type": "GAF"}, "gram": gram})
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_a_sketch_beside_a_scaling_rule_is_refused_by_name() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_block({"scaling": {"type": "VRGD"}, "gram": {"sketch": 64}})
    assert 'gradmix.gram: {"sketch": 64} with gradmix.scaling VRGD' in str(caught.value)
    assert 'allowed is "exact"' in str(caught.value)
    assert parse_block({"scaling": {"type": "VRGD"}, "gram": "exact"}).sketch_size is None
    assert parse_block({"mixing": {"type": "GAF"}, "gram": {"sketch": 64}}).sketch_size == 64


def test_a_misspelt_key_of_a_rule_is_told_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_block({"extrapolation": {"type": "Noise", "params": {"sdt": 1.0}}})
    assert str(caught.value) == (
        "gradmix.extrapolation.params.sdt: unknown key (value 1.0); allowed: distribution, std, std_ratio; "
        'did you mean "std"?'
    )


def test_the_error_is_public() -> None:
    assert ds_gradmix.ConfigError is ConfigError and issubclass(ConfigError, ValueError)


def test_names_in_any_case_and_defaults() -> None:
    block = parse_block({"mixing": {"type": "gaf", "params": {"threshold": 1}}, "scaling": {"type": "vrgd"}})
    assert type(block.mixing).__name__ == "GAF" and type(block.scaling).__name__ == "VRGD"
    assert parse_block({}) == parse_block(
        {"mixing": {"type": "MEAN"}, "scaling": None, "extrapolation": None}
    )


def test_misspelt_keys() -> None:
    for key in ("gradmx", "GradMix", "grad_mix", "gradient_mix", "ds_gradmix", "gradmixing"):
        assert misspelt_key({"bf16": {}, key: {}}) == key
    known = [
        "gradient_clipping",
        "gradient_accumulation_steps",
        "gradient_predivide_factor",
        "gradmix",
        "fp16",
    ]
    assert misspelt_key(dict.fromkeys(known)) is None


GAF = parse_block({"mixing": {"type": "GAF"}})
ZERO = {"stage": 2}
COMBINATIONS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"zero_optimization": {"stage": 4}}, {}, "zero_optimization.stage: 4"),
    *(
        ({"zero_optimization": {"stage": 3, **setting}}, {}, f"zero_optimization.{path}")
        for setting, path in (
            ({"reduce_scatter": False}, "reduce_scatter: false"),
            ({"zero_hpz_partition_size": 2}, "zero_hpz_partition_size: 2"),
            ({"zero_quantized_weights": True}, "zero_quantized_weights: true"),
            ({"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights: true"),
            ({"zero_quantized_gradients": True}, "zero_quantized_gradients: true"),
            ({"mics_shard_size": 2}, "mics_shard_size: 2"),
            ({"offload_optimizer": {"device": "nvme"}}, 'offload_optimizer.device: "nvme"'),
            ({"offload_param": {"device": "nvme"}}, 'offload_param.device: "nvme"'),
            (
                {"offload_optimizer": {"device": "cpu", "super_offload": True}},
                "offload_optimizer.super_offload: true",
            ),
            ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio: 0.5"),
        )
    ),
    ({"zero_optimization": {"stage": 3}}, {"scope": "model"}, "ZeRO-3"),
    ({"zero_optimization": {"stage": 3}}, {"worker": 2}, "gradmix.worker: 2"),
    (
        {
            "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
            "managed_gradient_accumulation": False,
        },
        {},
        "managed_gradient_accumulation: false, with offload_optimizer",
    ),
    (
        {"zero_optimization": {"stage": 3}},
        {"extrapolation": {"type": "PastGradient", "params": {"lr": 0.1}}},
        "PastGradient needs a whole gradient",
    ),
    ({"zero_optimization": {**ZERO, "zenflow": {"topk_ratio": 0.1}}}, {}, "zenflow"),
    ({"zero_optimization": ZERO, "compile": {"deepcompile": True}}, {}, "DeepCompile"),
    ({"zero_optimization": ZERO, "optimizer": {"type": "Muon"}}, {}, "Muon"),
    ({"zero_optimization": ZERO, "expert_parallel": {"enabled": True}}, {}, "AutoEP"),
    ({"zero_optimization": ZERO, "torch_autocast": {"enabled": True}}, {}, "torch_autocast"),
    ({"zero_optimization": ZERO, "hybrid_engine": {"enabled": True}}, {}, "hybrid_engine"),
    ({"zero_optimization": ZERO, "prescale_gradients": True}, {}, "prescale_gradients"),
    ({"zero_optimization": {"stage": 2}}, {"scope": "model"}, "set stage to 1"),
    ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, {"scope": "model"}, "overlap_comm to false"),
    ({"zero_optimization": ZERO, "fp16": {"enabled": True}}, {"nonfinite": "drop"}, "propagate"),
    (
        {"zero_optimization": ZERO, "managed_gradient_accumulation": False},
        {"extrapolation": {"type": "Noise", "params": {"std": 1.0}}},
        "managed_gradient_accumulation: false",
    ),
]


@pytest.mark.parametrize("config, block, words", COMBINATIONS, ids=[words for _, _, words in COMBINATIONS])
def test_what_cannot_be_combined(config: dict[str, Any], block: dict[str, Any], words: str) -> None:
    rules = parse_block({"mixing": {"type": "GAF"}, **block})
    refused = list(refused_settings(config, rules))
    assert len(refused) == 1 and words in refused[0]


def test_noise_is_not_refused_at_stage_3() -> None:
    rules = parse_block({"extrapolation": {"type": "Noise", "params": {"std": 0.1}}})
    assert not list(refused_settings({"zero_optimization": {"stage": 3}}, rules))


def test_every_refusal_is_tested() -> None:
    tested = " ".join(words for _, _, words in COMBINATIONS) + str([config for config, _, _ in COMBINATIONS])
    assert all(refusal.path.split(".")[-1] in tested for refusal in (*REFUSALS, *REFUSALS_OF_STAGE_3))


def test_defaults_are_not_refused() -> None:
    config = {
        "zero_optimization": {
            "stage": 1,
            "contiguous_gradients": True,
            "offload_optimizer": {"device": "cpu"},
        },
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    assert not list(refused_settings({"zero_optimization": ZERO}, GAF)) and not list(
        refused_settings(config, GAF)
    )


def write(path: Path, config: Any) -> str:
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"zero_optimization": ZERO, "gradmix": {"mixing": {"type": "gaf"}, "scaling": {"type": "VRGD"}}}
    assert main(["check", write(tmp_path / "good.json", good), "--workers", "4", "64"]) == 0
    out = capsys.readouterr().out
    assert main(["check", str(tmp_path / "good.json"), "--workers", "4", "64", "--json"]) == 0
    resolved = json.loads(capsys.readouterr().out)["gradmix"]
    assert resolved["mixing"] == {"type": "GAF", "params": {**resolved["mixing"]["params"], "threshold": 1.0}}
    assert parse_block(resolved) == parse_block(good["gradmix"])
    assert "0.500" in out and "0.625" in out and "96 MiB" in out and "reduce_bucket_size" in out


BF16_OPTIMIZER = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
BF16_OPTIMIZER["data_types"] = {"grad_accum_dtype": "fp32"}
OFFLOADED = {**BF16_OPTIMIZER, "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    "config, kind, memory",
    [
        ({}, "ZeRO-0", "3 tiles besides stock's (stock: a copy of the bucket, at most 1907.35 MiB and a"),
        ({"bf16": {"enabled": True}}, "ZeRO-0", "a copy of the bucket, at most 953.674 MiB and a parameter"),
        (BF16_OPTIMIZER, "BF16_Optimizer", "3 tiles (stock: a copy in bf16 of all gradients of a parameter"),
    ],
)
def test_check_where_every_rank_needs_the_result(
    config: Any, kind: str, memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for scope in ("bucket", "parameter", "model"):
        block = {"mixing": {"type": "GAF"}, "scaling": {"type": "VRGD"}, "scope": scope}
        path = write(tmp_path / "c.json", {**config, "gradmix": block})
        assert main(["check", path, "--workers", "4", "64"]) == 0
        out = capsys.readouterr().out
        table = [line.split() for line in out[out.index("  ranks") :].splitlines()[:3]]
        assert table == [["ranks", "buckets", "of", kind], ["4", "1.000"], ["64", "1.000"]]
        out = " ".join(out.split())  # long lines go on in the next
        assert memory in out and "one owner" not in out and "reduce_bucket_size" not in out
        assert ("waits for the decision" in out) == (scope == "model")


def test_check_of_zero_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the same data types as BF16_Optimizer, on CPU offload; and scope model sends once more."""
    block = {"mixing": {"type": "GAF"}, "scope": "model"}
    assert main(["check", write(tmp_path / "c.json", {**OFFLOADED, "gradmix": block}), "--workers", "4"]) == 0
    out = capsys.readouterr().out
    assert "1.000" in out and "1.125" in out and "one owner a bucket" in out


def test_check_tells_what_extrapolation_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = {"extrapolation": {"type": "PastGradient", "params": {"lr": 0.1}}}
    for steps, words in ((1, "one copy"), (4, "two copies")):
        config = {"zero_optimization": ZERO, "gradient_accumulation_steps": steps, "bf16": {"enabled": True}}
        assert main(["check", write(tmp_path / "c.json", {**config, "gradmix": rule})]) == 0
        assert f"PastGradient: {words} of the parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    "config, words",
    [
        ({"zero_optimization": ZERO}, 'has no "gradmix" block'),
        (
            {"zero_optimization": ZERO, "gradmix": {}, "gradmx": {}},
            '"gradmx" beside "gradmix" would be ignored',
        ),
        ({"zero_optimization": ZERO, "grad_mix": {}}, 'did you mean "gradmix" by "grad_mix"?'),
        ({"zero_optimization": ZERO, "gradmix": {"mixing": {"type": "gad"}}}, "gradmix.mixing.type"),
        ({"zero_optimization": {"stage": 4}, "gradmix": {}}, "zero_optimization.stage: 4"),
        ("{", "is not JSON"),
        ('{"gradmix": {"seed": ' + "9" * 5000 + "}}", "is not JSON: Exceeds the limit (4300 digits)"),
        ('{"gradmix": ' + "[" * 10**5, "is nested too deeply"),
        ('{"gradmix": {"s\\n\\u2028": 1, "s\\n\\u2028": 2}}', "duplicate keys: s\\n\\u2028; give each once"),
        ({"gradmix": {"s\n\u2028\ud800": 1}}, "gradmix.s\\n\\u2028\\ud800: unknown key"),
        ({"gradmx\n": {}}, 'did you mean "gradmix" by "gradmx\\n"?'),
        ("[1]", "is not a JSON object"),
        ('{"gradmix": {"seed": 1, "seed": 2}}', "duplicate keys: seed"),
    ],
)
def test_check_tells_mistakes(
    config: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "bad.json", config)
    assert main(["check", path]) == 2
    error = capsys.readouterr().err
    assert words in error and all(line.startswith(f"{path}: ") for line in error.splitlines())


def test_check_tells_mistakes_of_our_optimizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without importing DeepSpeed for it."""
    section = {"type": "LAMB", "params": {"betas": [0.9, 2], "beta": 1}}
    path = write(tmp_path / "c.json", {"gradmix": {}, "optimizer": section})
    assert main(["check", path]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert f"{path}: optimizer.params.beta: unknown key (value 1); allowed: lr, betas, eps" in first
    assert f"{path}: optimizer.params.betas: 2, but allowed is a number of at least 0 and below 1" in second


def test_check_without_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "none.json")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_at_stage_3_a_sketch_is_the_default() -> None:
    """For rules that decide from Gram matrices before gradients are summed, unless `gram` is given."""
    for block, size in (
        ({"mixing": {"type": "GAF"}}, 65536),
        ({"mixing": {"type": "GAF"}, "gram": "exact"}, None),
        ({"mixing": {"type": "GAF"}, "gram": {"sketch": 64}}, 64),
        ({"mixing": {"type": "GAF"}, "scaling": {"type": "VRGD"}}, None),
        ({"mixing": {"type": "Mean"}}, None),
    ):
        assert for_stage(parse_block(block), 3).sketch_size == size, block
        assert for_stage(parse_block(block), 2).sketch_size == parse_block(block).sketch_size
