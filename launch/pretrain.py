"""Pretrains a causal language model: an ordinary DeepSpeed script, with or without ds_gradmix.

    deepspeed [--module ds_gradmix] launch/pretrain.py --deepspeed_config DS.json --model MODEL.json \
        --data FOLDER --out RUN --steps N

It also runs under torchrun and srun, or as one process. The same command resumes an interrupted run: the data
that a rank reads at a step depends on the seed alone, so the resumed run continues as if it had not been
interrupted. SIGINT and SIGTERM end a run after the current step, with a checkpoint. --tensor-parallel and
--pipeline-stages divide each replica of the model over several ranks. --fault is for drills.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it when imported; nothing is downloaded

import argparse
import json
import signal
import sys
import warnings
from functools import partial
from typing import Any

import deepspeed
import deepspeed.ops
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.engine import PipelineEngine
from gradmix_pretrain import checkpoint, pipeline
from gradmix_pretrain.faults import Drill, with_faults
from gradmix_pretrain.metrics import MetricsFile, draw_summary, read_lines, report, write_report
from gradmix_pretrain.schedule import cosine_with_warmup
from gradmix_pretrain.settings import Inputs, check, load_json, parse_args, set_process_environment
from gradmix_pretrain.tokens import TrainingWindows, validation_batches
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import AutoModelForCausalLM

try:
    from ds_gradmix import stats
except ImportError:  # plain DeepSpeed

    def stats(engine: Any) -> dict[str, float]:
        return {}


def main() -> None:
    args = parse_args()
    set_process_environment()
    try:
        inputs = check(args)
        checkpoint.check_identity(args.out, identity(args, inputs))
        args.out.mkdir(parents=True, exist_ok=True)
        held = checkpoint.lock(args.out) if os.environ["RANK"] == "0" else None
        complete = checkpoint.latest_step(args.out / "checkpoint") >= args.steps
        model = None if complete else build_model(args, inputs)
    except ValueError as error:
        sys.exit(f"pretrain.py: error: {error}")
    if model is not None:
        complete = train(args, inputs, model)
        dist.destroy_process_group()
    if held is not None:
        lines = read_lines(args.out / "metrics.jsonl")
        draw_summary(lines, args.out / "summary.png")
        print(
            f"{args.out}: {'complete' if complete else 'stopped; the same command resumes'}: {report(lines)}"
        )
        print(write_report(args.out))
    if not complete:
        sys.exit(1)


def identity(args: argparse.Namespace, inputs: Inputs) -> dict[str, Any]:
    """What must be equal in a resumed run; the rules and the optimizer's settings may change."""
    values = {
        "model": load_json(args.model, "--model"),
        "tokens": inputs.tokens.sha256,
        "sequence_length": inputs.sequence_length,
        "seed": args.seed,
    }
    if not inputs.ds_config.get("checkpoint", {}).get("load_universal"):
        values["number of ranks"] = int(os.environ["WORLD_SIZE"])
        values["tensor parallelism"] = inputs.tensor_parallel
        values["number of pipeline stages"] = inputs.pipeline_stages
    return values


def train(args: argparse.Namespace, inputs: Inputs, model: torch.nn.Module | pipeline.Layers) -> bool:
    """Train from the last checkpoint to `args.steps`; returns False if a signal ended the training before."""
    engine = build_engine(args, inputs, model)
    rank, folder = dist.get_rank(), args.out / "checkpoint"
    first = checkpoint.load(engine, folder)
    metrics = None
    if rank == 0:
        checkpoint.write_text(args.out / "run.json", json.dumps(identity(args, inputs), indent=2))
        metrics = MetricsFile(args.out / "metrics.jsonl", last_step=first)
    windows, held_out = build_data(args, inputs, engine)
    drill = Drill(inputs.faults, rank)
    drill.attach(engine.module, args.seed, windows.accumulation_steps)
    stop = StopRequest()
    bar = progress_bar(first, args.steps, rank)
    for step in range(first + 1, args.steps + 1):
        drill.begin(step)
        line, stopping = train_step(engine, windows, step, stop)
        if step == 1 or step == args.steps or step % args.validate_every == 0:
            line["val_loss"] = validate(engine, held_out)
            bar.set_postfix_str(f"validation loss {line['val_loss']:.3f}", refresh=False)
        bar.update()
        if metrics is not None:
            metrics.write(line)
        if stopping or step == args.steps or step % args.checkpoint_every == 0:
            if metrics is not None:
                metrics.sync()
            checkpoint.save(engine, folder, step, args.keep_checkpoints)
            if rank == 0:
                bar.write(f"step {step}: checkpoint saved", file=sys.stderr)
        if stopping:
            break
    bar.close()
    return step == args.steps


def build_engine(args: argparse.Namespace, inputs: Inputs, model: torch.nn.Module | pipeline.Layers) -> Any:
    """The DeepSpeed engine; weight decay applies to matrices only."""
    deepspeed.utils.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    # Or one is compiled for half a minute, which only DeepSpeed's inference uses.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed()
    if isinstance(model, pipeline.Layers):
        model = model.on_this_stage(inputs.pipeline_stages)
    exact_buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    factor = partial(
        cosine_with_warmup, warmup_steps=args.warmup_steps, total_steps=args.steps, floor=args.lr_floor
    )
    # A scheduler in DeepSpeed's configuration takes precedence.
    schedule = None if "scheduler" in inputs.ds_config else lambda optimizer: LambdaLR(optimizer, factor)
    engine, *_ = deepspeed.initialize(
        model=model,
        config=inputs.ds_config,
        model_parameters=[group for group in groups if group["params"]],
        lr_scheduler=schedule,
    )
    # The engine has cast the buffers as well, but in bf16 rotary frequencies are too coarse for far tokens.
    for name, buffer in model.named_buffers():
        buffer.data = exact_buffers[name].to(buffer.device)
    return engine


def build_model(args: argparse.Namespace, inputs: Inputs) -> torch.nn.Module | pipeline.Layers:
    """Initialize the weights on this rank's device; DeepSpeed broadcasts those of the first replica."""
    torch.manual_seed(args.seed)
    with torch.device(get_accelerator().device_name(int(os.environ["LOCAL_RANK"]))):
        model = AutoModelForCausalLM.from_config(inputs.model_config, dtype=torch.float32)
    model.config.use_cache = False
    if args.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model if inputs.pipeline_stages == 1 else pipeline.Layers(model)


def build_data(
    args: argparse.Namespace, inputs: Inputs, engine: Any
) -> tuple[TrainingWindows, list[torch.Tensor]]:
    """This rank's training windows and validation batches.

    Ranks that share a replica of the model, by tensor parallelism or a pipeline, read the same data.
    """
    rank, world_size = dist.get_rank(engine.data_parallel_group), engine.dp_world_size
    tokens, length = inputs.tokens, inputs.sequence_length
    batch_size, accumulation_steps = (
        engine.train_micro_batch_size_per_gpu(),
        engine.gradient_accumulation_steps(),
    )
    windows = TrainingWindows(
        tokens.train_N, length, batch_size, accumulation_steps, rank, world_size, args.seed
    )
    return (
        with_faults(windows, inputs.faults, tokens.vocab_size),
        validation_batches(
            tokens.validation_N, length, batch_size, args.validation_windows, rank, world_size
        ),
    )


def train_step(
    engine: Any, windows: TrainingWindows, step: int, stop: "StopRequest"
) -> tuple[dict[str, Any], bool]:
    """Take an optimizer step, counted from 1; returns its metrics, and whether a rank received a signal."""
    # A seed for each step, so that dropout in a resumed run is as in an uninterrupted one.
    torch.manual_seed(int(np.random.SeedSequence((windows.seed, step, windows.rank)).generate_state(1)[0]))
    skipped_before = engine.skipped_steps
    line: dict[str, Any] = {"step": step, "lr": engine.get_lr()[0]}
    micro_batches = (
        windows.batch(step - 1, micro_step).to(engine.device)
        for micro_step in range(windows.accumulation_steps)
    )
    loss_and_stop = torch.zeros(2, device=engine.device)
    if isinstance(engine, PipelineEngine):
        loss_and_stop[0] = pipeline.train_batch(engine, micro_batches)
    else:
        for batch_BT in micro_batches:
            loss = engine(input_ids=batch_BT, labels=batch_BT).loss
            engine.backward(loss)
            engine.step()
            loss_and_stop[0] += loss.detach().float() / windows.accumulation_steps
    loss_and_stop[1] = float(stop.requested)
    # Ranks receive a signal at different times, or only one receives it, but all must stop at the same step.
    dist.all_reduce(loss_and_stop)
    loss_sum, num_stopping = loss_and_stop.tolist()
    grad_norm = engine.get_global_grad_norm()
    line["loss"] = loss_sum / dist.get_world_size()  # ranks that share a replica have equal losses
    line["grad_norm"] = None if grad_norm is None else float(grad_norm)
    line["skipped"] = engine.skipped_steps > skipped_before
    # Without what differs from run to run, and numbers of each worker: telemetry has a file for these.
    told = {name: value for name, value in stats(engine).items() if name != "seconds" and "/" not in name}
    return line | told | line, num_stopping > 0


@torch.no_grad()
def validate(engine: Any, batches: list[torch.Tensor]) -> float:
    """The mean loss over the validation batches of all ranks, which have equal sizes."""
    if isinstance(engine, PipelineEngine):
        return pipeline.evaluate(engine, batches).item()
    engine.eval()
    total = torch.zeros((), device=engine.device)
    for batch_BT in batches:
        batch_BT = batch_BT.to(engine.device)
        total += engine(input_ids=batch_BT, labels=batch_BT).loss.float()
    engine.train()
    dist.all_reduce(total)
    return total.item() / (len(batches) * dist.get_world_size())


class StopRequest:
    """Handles SIGINT and SIGTERM by recording them, so that they never interrupt a checkpoint."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.requested = True


def progress_bar(first: int, total: int, rank: int) -> tqdm:
    # In a log file, a line every 10 seconds is enough.
    seconds = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm(
        initial=first, total=total, unit="step", disable=rank != 0, mininterval=seconds, smoothing=0.1
    )


if __name__ == "__main__":
    main()
