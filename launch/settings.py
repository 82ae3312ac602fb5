"""The command line of pretrain.py, and what can be found wrong with it before any training starts."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokens import Tokens, open_tokens
from transformers import AutoConfig, PretrainedConfig


@dataclass(frozen=True)
class Inputs:
    model_config: PretrainedConfig
    ds_config: dict[str, Any]
    tokens: Tokens
    sequence_length: int


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
    add("--activation-checkpointing", action="store_true", help="recompute activations in backward")
    add("--seed", type=int, default=1234)
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
    model_config = load_model_config(args.model)
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
    return Inputs(model_config, ds_config, tokens, length)


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
    """Fill in what torch.distributed reads where the launcher did not: under srun, or without any."""
    environment = os.environ
    environment.setdefault("RANK", environment.get("SLURM_PROCID", "0"))
    environment.setdefault("WORLD_SIZE", environment.get("SLURM_NTASKS", "1"))
    # A Slurm task may see only the GPUs that are its own.
    num_visible = torch.cuda.device_count() or int(environment["WORLD_SIZE"])
    environment.setdefault("LOCAL_RANK", str(int(environment.get("SLURM_LOCALID", "0")) % num_visible))
    environment.setdefault("MASTER_ADDR", environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
    environment.setdefault("MASTER_PORT", "29500")
