"""The command line of pretrain.py, and what can be found wrong with it before any training starts."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from gradmix_pretrain import pipeline
from gradmix_pretrain.faults import Fault, Training, parse_fault
from gradmix_pretrain.tokens import Tokens, open_tokens

try:
    from ds_gradmix.slurm import rank_environment
except ImportError:  # plain DeepSpeed

    def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
        return {}


@dataclass(frozen=True)
class Inputs:
    model_config: PretrainedConfig
    ds_config: dict[str, Any]
    tokens: Tokens
    sequence_length: int
    tensor_parallel: int
    pipeline_stages: int
    faults: list[Fault]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain a causal language model with DeepSpeed.")
    add = parser.add_argument
    add("--deepspeed_config", type=Path, required=True, help="DeepSpeed's JSON configuration")
    add("--model", type=Path, required=True, help="a transformers config JSON of any causal language model")
    add("--data", type=Path, required=True, help="folder made by launch/prepare.py")
    add(
        "--out",
        type=Path,
        required=True,
        help="run folder: metrics, summary, checkpoints; resumed if there is one",
    )
    add("--steps", type=int, required=True, help="optimizer steps in all")
    add("--sequence-length", type=int, help="tokens a sequence (default: the model's longest)")
    add("--warmup-steps", type=int, default=0)
    add(
        "--lr-floor",
        type=float,
        default=0.1,
        help="where the cosine ends, as a fraction of the learning rate",
    )
    add("--validate-every", type=int, default=100, help="steps between validations")
    add("--validation-windows", type=int, default=256, help="held-out sequences in one validation")
    add("--checkpoint-every", type=int, default=500, help="steps between checkpoints")
    add("--keep-checkpoints", type=int, default=2, help="how many of the newest to keep")
    add(
        "--telemetry",
        action="store_true",
        help="switched on, with the file OUT/gradmix.jsonl",
    )
    add("--fp32", action="store_true", help="instead of the configuration's bf16 or fp16")
    add("--activation-checkpointing", action="store_true", help="recompute activations in backward")
    add(
        "--tensor-parallel",
        type=int,
        help="ranks that split every layer, by AutoTP (default: tensor_parallel.autotp_size, or 1)",
    )
    add("--pipeline-stages", type=int, default=1, help="stages of a pipeline, each on a rank of its own")
    add("--seed", type=int, default=1234)
    add(
        "--fault",
        action="append",
        default=[],
        metavar="KIND:rank=R:from=STEP[:until=STEP]",
        help="for drills: train one replica on something wrong (docs/cluster.md); may be repeated",
    )
    add("--local_rank", type=int, help="set by the deepspeed launcher")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> Inputs:
    """What the arguments name, loaded; ValueError with one line for whoever typed them."""
    for name in ("steps", "validate_every", "validation_windows", "checkpoint_every", "keep_checkpoints"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} is less than 1")
    ds_config = load_json(args.deepspeed_config, "--deepspeed_config")
    if "optimizer" not in ds_config:
        raise ValueError(f'--deepspeed_config {args.deepspeed_config} has no "optimizer"')
    if args.fp32:
        ds_config = {name: value for name, value in ds_config.items() if name not in ("bf16", "fp16")}
    if args.telemetry:
        watch(ds_config, args.out / "gradmix.jsonl")
    model_config = load_model_config(args.model)
    tensor_parallel, pipeline_stages = check_parallelism(args, ds_config, model_config)
    if tensor_parallel > 1:
        ds_config.setdefault("tensor_parallel", {})["autotp_size"] = tensor_parallel
    tokens = open_tokens(args.data)
    if tokens.vocab_size > model_config.vocab_size:
        raise ValueError(
            f"--model {args.model} has vocab_size {model_config.vocab_size}, "
            f"but the tokens in {args.data} need {tokens.vocab_size}"
        )
    longest = getattr(model_config, "max_position_embeddings", None)
    length = args.sequence_length or longest
    if length is None or length < 2:
        raise ValueError(f"--sequence-length {length}: give one of at least 2")
    if longest is not None and length > longest:
        raise ValueError(
            f"--sequence-length {length} is longer than the model's max_position_embeddings {longest}"
        )
    for name, tokens_N in (("training", tokens.train_N), ("validation", tokens.validation_N)):
        if len(tokens_N) < length:
            raise ValueError(
                f"--data {args.data} has {len(tokens_N)} {name} tokens, fewer than one sequence of {length}"
            )
    training = Training(
        args.steps,
        int(os.environ.get("WORLD_SIZE", "1")),
        tensor_parallel,
        pipeline_stages,
        bool(ds_config.get("fp16", {}).get("enabled")),
    )
    faults = [parse_fault(text, training) for text in args.fault]
    return Inputs(model_config, ds_config, tokens, length, tensor_parallel, pipeline_stages, faults)


def watch(ds_config: dict[str, Any], path: Path) -> None:
    """Have the block, if there is one, write its telemetry to a file, unless it names another."""
    block = ds_config.get("gradmix")
    if isinstance(block, dict):
        given = block.get("telemetry")
        block["telemetry"] = {"path": str(path), **(given if isinstance(given, dict) else {})}


def check_parallelism(
    args: argparse.Namespace, ds_config: dict[str, Any], model_config: PretrainedConfig
) -> tuple[int, int]:
    """How many ranks split each layer, and how many stages the layers are spread over."""
    configured = ds_config.get("tensor_parallel", {}).get("autotp_size", 0)  # 0 is DeepSpeed's "off"
    tensor_parallel = (configured or 1) if args.tensor_parallel is None else args.tensor_parallel
    stages = args.pipeline_stages
    if configured not in (0, tensor_parallel):
        raise ValueError(
            f"--tensor-parallel {tensor_parallel} contradicts tensor_parallel.autotp_size {configured} "
            f"in {args.deepspeed_config}"
        )
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    for option, degree in (("--tensor-parallel", tensor_parallel), ("--pipeline-stages", stages)):
        if degree < 1 or (degree > 1 and num_ranks % degree):
            raise ValueError(f"{option} {degree} does not divide the number of ranks, {num_ranks}")
    if tensor_parallel > 1 and stages > 1:
        raise ValueError(
            f"--tensor-parallel {tensor_parallel} with --pipeline-stages {stages}: "
            "DeepSpeed's AutoTP does not reach into a pipeline; give one of both"
        )
    if tensor_parallel > 1 and "train_batch_size" in ds_config:
        raise ValueError(
            f"--tensor-parallel {tensor_parallel} with train_batch_size: DeepSpeed would count every rank as "
            "a replica; give train_micro_batch_size_per_gpu and gradient_accumulation_steps"
        )
    if stages > 1:
        check_pipeline(args, ds_config, model_config)
    return tensor_parallel, stages


def check_pipeline(
    args: argparse.Namespace, ds_config: dict[str, Any], model_config: PretrainedConfig
) -> None:
    stages = args.pipeline_stages
    zero_stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    if zero_stage > 1:
        raise ValueError(
            f"--pipeline-stages {stages} needs zero_optimization.stage 0 or 1, "
            f"but {args.deepspeed_config} has {zero_stage}"
        )
    in_16_bits = any(ds_config.get(name, {}).get("enabled") for name in ("fp16", "bf16"))
    if zero_stage == 0 and not in_16_bits and ds_config.get("gradient_clipping", 1.0):  # DeepSpeed's default
        raise ValueError(
            f"--pipeline-stages {stages} in fp32 with zero_optimization.stage 0: DeepSpeed would clip by the "
            "first stage's gradient norm alone; take stage 1, or gradient_clipping 0"
        )
    if missing := pipeline.missing_parts(model_config):
        raise ValueError(f"--pipeline-stages {stages}: --model {args.model} has no {', no '.join(missing)}")
    if stages > model_config.num_hidden_layers:
        raise ValueError(
            f"--pipeline-stages {stages} is more than the {model_config.num_hidden_layers} layers of "
            f"--model {args.model}"
        )


def load_model_config(path: Path) -> PretrainedConfig:
    values = load_json(path, "--model")
    model_type = values.pop("model_type", None)
    try:
        return AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--model {path}: model_type {model_type!r}: {reason[:200]}") from error


def load_json(path: Path, option: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{option} {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{option} {path} is not a JSON object")
    return values


def set_process_environment() -> None:
    """Fill in what torch.distributed reads where the launcher did not: under srun, or as one process."""
    environment = os.environ
    found = rank_environment(environment)
    if "LOCAL_RANK" in found:  # a Slurm task may see only the GPUs that are its own
        num_visible = torch.cuda.device_count() or int(found.get("WORLD_SIZE", "1"))
        found["LOCAL_RANK"] = str(int(found["LOCAL_RANK"]) % num_visible)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment |= {**alone, "MASTER_PORT": "29500", **found, **environment}
