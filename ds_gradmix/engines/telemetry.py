"""What is told of an engine's workers: statistics, monitors, a file of JSON lines, warnings, and the end of a
run whose worker looks faulty.
"""

import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from ds_gradmix.comm.groups import TRAFFIC, gather_objects
from ds_gradmix.comm.workers import ParallelGroups
from ds_gradmix.config import KEY, ConfigError, GradmixConfig
from ds_gradmix.config_messages import value_text
from ds_gradmix.engines.places import find_places
from ds_gradmix.engines.reporting import report_step
from ds_gradmix.exchange.participation import Change
from ds_gradmix.exchange.reducer import GradientReducer
from ds_gradmix.exchange.watch import Told
from ds_gradmix.log import logger
from ds_gradmix.telemetry import numbers
from ds_gradmix.telemetry.alarms import EXIT_STATUS, Alarm, Alarms

_WORKERS_IN_MONITORS = 64  # with more of them, monitors are not given numbers of each


class StepReporter:
    """Tells of an engine's steps; all ranks must build it, since they find out where workers are."""

    def __init__(self, engine: Any, block: GradmixConfig, parallel: ParallelGroups) -> None:
        self._engine = engine
        self._settings = settings = block.telemetry
        self._num_steps = 0  # since the last reading
        self._bytes_before = 0.0
        self._stop: Alarm | None = None
        self._is_first = parallel.model.is_first
        self._size, self._num_replicas = parallel.workers.size, parallel.workers.num_replicas
        self._tokens = None if settings is None else settings.tokens_per_sample
        self._places = find_places(parallel) if settings is not None or block.mixing.observes else []
        self._alarms = self._file = None
        if settings is not None:
            scales = bool(engine.fp16_enabled()) and bool(engine.dynamic_loss_scale())
            self._alarms = Alarms(settings, self._size, scales_loss=scales)
            self._file = self._open(settings.path)
            self._header = {"kind": "run", "rules": block.describe(), "every": settings.every}

    def _open(self, path: str | None) -> TextIO | None:
        """The file, on the first rank; a mistake is raised on all ranks."""
        file, wrong = None, None
        if path is not None and dist.get_rank() == 0:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                file = open(path, "a", buffering=1)  # noqa: SIM115
            except OSError as error:
                wrong = str(error.strerror)
        if path is not None and (found := next(filter(None, gather_objects(wrong)), None)):
            raise ConfigError(
                f"{KEY}.telemetry.path: {value_text(path)} cannot be written on rank 0 ({found}); allowed is "
                "a file that can be appended to; change it, or remove it for none"
            )
        return file

    def __call__(self, reducer: GradientReducer, told: Told | None) -> None:
        """Tell of a step; `told` is what was read of it, if it was."""
        self._num_steps += 1
        if told is None:
            return
        lists, events = {}, []
        if self._places:
            lists = numbers.by_worker(told.reading, told.kept)
            events += [self._change(change) for change in told.changes]
        if self._settings is not None:
            offset = None if reducer.weights is None else reducer.weights.offset_ratio
            effort = {"seconds": reducer.clock.read(), "bytes_sent": TRAFFIC.bytes_sent - self._bytes_before}
            self._bytes_before = TRAFFIC.bytes_sent
            reducer.stats = {
                **reducer.stats,
                **({} if told.reading is None else numbers.scalars(told.reading, self._tokens)),
                **{name: value / self._num_steps for name, value in effort.items()},
                **({} if offset is None else {"offset_ratio": offset}),
                **numbers.flattened(lists),
            }
        if self._alarms is not None and told.reading is not None:
            events += [self._alarm(alarm) for alarm in self._alarms.hear(told.reading, self._step)]
        self._num_steps = 0
        report_step(self._engine, reducer.stats, self._size <= _WORKERS_IN_MONITORS)
        if self._file is not None:
            self._write(self._file, reducer.stats, lists, events, told)

    @property
    def _step(self) -> int:
        """The number of the step that is told of, counted from 1."""
        return int(self._engine.global_steps) + 1

    def _change(self, change: Change) -> dict[str, Any]:
        """A worker is left out of the mean, or back in it."""
        worker, step, is_left_out = change
        if self._is_first:
            what = "left out of the mean, since its gradients do not agree with the others'"
            what = what if is_left_out else "back in the mean"
            logger.warning(f"ds_gradmix: step {step}: {self._places[worker]} is {what}")
        event = {"event": "left out" if is_left_out else "returned", "step": step}
        return {"kind": "event", **event, **self._where(worker)}

    def _alarm(self, alarm: Alarm) -> dict[str, Any]:
        if self._is_first:
            logger.warning(f"ds_gradmix: {alarm.sentence(self._places)}")
        if self._settings is not None and self._settings.on_alarm == "stop":
            self._stop = alarm
        event = {"event": "alarm", "step": alarm.step, "since": alarm.since, "what": " and ".join(alarm.what)}
        return {"kind": "event", **event, **self._where(alarm.worker)}

    def _where(self, worker: int) -> dict[str, Any]:
        ranks, hosts = self._places[worker]
        return {"worker": worker, "ranks": list(ranks), "host": ", ".join(hosts)}

    def _write(
        self,
        file: TextIO,
        stats: Mapping[str, float],
        lists: Mapping[str, list[float]],
        events: list[dict[str, Any]],
        told: Told,
    ) -> None:
        lines, batch = [*events], int(self._engine.train_batch_size())
        if self._header:
            workers = [{"worker": i, "ranks": p.ranks, "hosts": p.hosts} for i, p in enumerate(self._places)]
            engine, replicas = self._engine, self._num_replicas
            of_worker = (
                engine.train_micro_batch_size_per_gpu() * engine.gradient_accumulation_steps() * replicas
            )
            samples = {"samples_per_worker": of_worker / self._size, "tokens_per_sample": self._tokens}
            lines.insert(0, {**self._header, **samples, "workers": workers})
            self._header = {}
        scalars = {name: value for name, value in stats.items() if "/" not in name}
        rates = [float(group["lr"]) for group in self._engine.optimizer.param_groups]
        about = {"step": self._step, "samples": int(self._engine.global_samples) + batch, "lr": rates[0]}
        keys = ("norm", "agreement", "noise_scale")
        layers = {name: dict(zip(keys, row, strict=True)) for name, row in told.parameters.items()}
        lines.append(
            {"kind": "step", **about, **scalars, **lists, **({"parameters": layers} if layers else {})}
        )
        try:
            file.write("".join(json.dumps(numbers.finite(line), allow_nan=False) + "\n" for line in lines))
        except OSError as error:  # a full disk must not end a training
            logger.warning(f"ds_gradmix: {KEY}.telemetry.path is written no more: {error}")
            self._file = None

    # --- what is attached to the engine ---

    def attach(self, reducer: GradientReducer) -> None:
        """Have DeepSpeed's timers measure our part where it breaks down its time, look at the first batch for
        its sequences' length, and end the run at an alarm if asked to.
        """
        if self._engine.wall_clock_breakdown():
            reducer.clock.timer = self._engine.timers(KEY)
            self._engine.engine_timers.global_timers.append(KEY)
        if self._settings is None:
            return
        self._bytes_before = TRAFFIC.bytes_sent
        if self._tokens is None:
            hook = _FirstBatch(self._note_tokens)
            self._hook = self._engine.module.register_forward_pre_hook(hook, with_kwargs=True)
        if self._settings.on_alarm == "stop":
            for name in ("step", "train_batch"):
                if hasattr(self._engine, name):
                    setattr(self._engine, name, self._then_stop(getattr(self._engine, name)))

    def _note_tokens(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._hook.remove()
        first = kwargs.get("input_ids", args[0] if args else None)
        first = first[0] if isinstance(first, tuple) and first else first
        if isinstance(first, torch.Tensor) and first.dim() == 2 and not first.is_floating_point():
            self._tokens = first.shape[1] * int(self._engine.sequence_parallel_size)

    def _then_stop(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            if self._stop is not None and self._settings is not None:
                self._end(self._settings.checkpoint_dir)
            return result

        return wrapped

    def _end(self, folder: str) -> None:
        """Save a checkpoint and end this rank, as all others do at the same step."""
        self._engine.save_checkpoint(folder)
        if self._is_first:
            logger.warning(
                f"ds_gradmix: stopping with exit status {EXIT_STATUS}, as {KEY}.telemetry.on_alarm says; a "
                f"checkpoint is in {folder}"
            )
        dist.barrier()
        dist.destroy_process_group()  # or its threads may abort the interpreter, whose status is 1
        sys.exit(EXIT_STATUS)


class _FirstBatch:
    """A forward hook; it does nothing in a copy of the module."""

    def __init__(self, action: Callable[..., None] = lambda *_: None) -> None:
        self._action = action

    def __call__(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._action(args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _FirstBatch, ()
