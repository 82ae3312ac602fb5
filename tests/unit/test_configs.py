"""Every file under configs/ is one that DeepSpeed, ds_gradmix or transformers takes."""

import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from gradmix_pretrain.settings import load_model_config
from transformers import AutoModelForCausalLM

from ds_gradmix.cli import main
from ds_gradmix.config import parse_block
from ds_gradmix.engines.optimizer_section import OPTIMIZERS, optimizer_of

ROOT = Path(__file__).resolve().parents[2]

DS_CONFIGS = sorted((ROOT / "configs").glob("*.json"))
MEGATRON = sorted((ROOT / "configs" / "megatron").glob("*.json"))
MODELS = sorted((ROOT / "configs" / "models").glob("*.json"))

PARAMETERS = {"llama-tiny": 1.9e6, "llama-1b": 1.1e9, "llama-7b": 6.7e9}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


@pytest.mark.parametrize("path", [*DS_CONFIGS, *MEGATRON], ids=name)
def test_deepspeed_takes_it(path: Path) -> None:
    config = DeepSpeedConfig(str(path))
    assert f"zero{config.zero_optimization_stage}" == path.stem.split("_")[-1]
    assert config.bfloat16_config.enabled
    assert config.gradient_clipping == 1.0
    if path in MEGATRON:
        assert config.optimizer_name is None, "Megatron brings its own"
        assert main(["check", str(path)]) == 0
        return
    if config.optimizer_name.lower() in OPTIMIZERS:
        assert optimizer_of(json.loads(path.read_text())) is not None
        assert main(["check", str(path)]) == 0
        return
    assert config.optimizer_params["torch_adam"], "DeepSpeed's own Adam would have to be compiled first"


@pytest.mark.parametrize("path", [*DS_CONFIGS, *MEGATRON], ids=name)
def test_its_block_names_the_rules_that_its_name_does(path: Path) -> None:
    config = json.loads(path.read_text())
    block = parse_block(config["gradmix"])
    rules = {
        type(rule).__name__.lower()
        for rule in (block.mixing, block.scaling, block.extrapolation)
        if rule is not None
    }
    if len(rules) > 1:
        rules -= {"mean"}
    words = path.stem.split("_")[:-1]
    if words[0] == "vr":  # VRGD in front of the optimizer of that name
        assert words[1:] == [config["optimizer"]["type"].lower()]
        words = ["vrgd"]
    assert rules == set(words) - {"model"}
    assert (block.scope == "model") == ("model" in path.stem)


@pytest.mark.parametrize("path", [*DS_CONFIGS, *MEGATRON], ids=name)
def test_only_the_rules_differ(path: Path) -> None:
    """So that two of them can be compared: same batch, optimizer (but for those that are of another one),
    precision and clipping as the control.
    """
    control = json.loads(next(path.parent.glob("mean_zero*.json")).read_text())
    config = json.loads(path.read_text())
    for values in (control, config):
        values.pop("gradmix", None)
        values.pop("zero_optimization")
        if path.stem.startswith("vr_"):
            values.pop("optimizer")
    assert config == control


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_builds(path: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_model_config(path))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters == pytest.approx(PARAMETERS[path.stem], rel=0.03)
