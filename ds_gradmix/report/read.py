"""Reads the JSON lines of a run into one array for each number that was recorded.

A run is a folder, whose `*.jsonl` files are merged by step, or one such file. Lines are those of telemetry,
of the kinds "run", "step" and "event", and those of `launch/pretrain.py`, with a step and no kind; others are
passed over. Where training was resumed, a step may stand in a file twice: the later line counts, and what was
written of later steps before the interruption is dropped.
"""

import json
import math
import re
import statistics
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Vector = NDArray[np.float32]


class ReadError(ValueError):
    """A run that cannot be read, said in one line."""


class Series(NamedTuple):
    """A number, or a row of numbers, at rising steps."""

    steps_T: NDArray[np.int64]
    values: Floats  # (T,), or (T, workers or layers), where NaN stands for what is not known


class Event(NamedTuple):
    """An alarm about a worker, or that it was left out of the mix or has returned to it."""

    step: int
    event: str
    worker: int | None
    what: str
    since: int | None
    ranks: tuple[int, ...]
    host: str


@dataclass
class Run:
    """What one run recorded."""

    name: str
    header: dict[str, Any] = field(default_factory=dict)  # telemetry's last one
    series: dict[str, Series] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)  # whose numbers "layer_norm" and so on have
    events: list[Event] = field(default_factory=list)
    unreadable: int = 0  # lines that are not JSON objects


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of these folders or files, each with a name of its own.

    Raises:
        ReadError: One is missing, or has no line with a step.
    """
    names = [_name(path) for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path} ({i})" if paths.count(path) > 1 else str(path) for i, path in enumerate(paths, 1)]
    return [_read_run(path, name) for path, name in zip(paths, names, strict=True)]


def _name(path: Path) -> str:
    full = path.resolve()
    return f"{full.parent.name}/{full.name}" if full.suffix == ".jsonl" else full.name


def _read_run(path: Path, name: str) -> Run:
    if not path.exists():
        raise ReadError(f"{path}: no such folder or file")
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl"))
    if not files:
        raise ReadError(f"{path}: has no *.jsonl file; telemetry and launch/pretrain.py write one")
    run, layers = Run(name), dict[str, int]()
    parts = [_File(layers) for _ in files]
    for part, file in zip(parts, files, strict=True):
        try:
            with file.open(encoding="utf-8", errors="replace") as lines:
                part.read(lines)
        except OSError as error:
            raise ReadError(f"{file}: cannot be read: {error.strerror}") from error
        run.header |= part.header
        run.unreadable += part.unreadable
    run.layers = list(layers)
    for key in sorted({key for part in parts for key in part.columns}):
        if columns := [part.columns[key] for part in parts if part.columns.get(key, ([],))[0]]:
            run.series[key] = _series(columns)
    run.events = sorted(
        {event for part in parts for event in part.events}, key=lambda each: (each.step, repr(each))
    )
    if not run.series and not run.events:
        raise ReadError(f"{path}: no line of it has a step; is it a run's folder?")
    _add_batches(run)
    return run


def _add_batches(run: Run) -> None:
    """Add "batch" and "batch_tokens", of a step, which noise scales are compared with."""
    workers, noise = run.header.get("workers"), run.series.get("noise_scale")
    batch = _number(run.header.get("samples_per_worker")) * (len(workers) if isinstance(workers, list) else 0)
    for key, size in (("batch", 1.0), ("batch_tokens", _number(run.header.get("tokens_per_sample")))):
        if noise is not None and batch * size > 0:
            run.series[key] = Series(noise.steps_T[[0, -1]], np.full(2, batch * size))


def _series(parts: Sequence[tuple[Any, Any]]) -> Series:
    """The columns of several files as one; of a step that more than one has, the value of the last counts."""
    steps_T = np.concatenate([np.array(steps, dtype=np.int64) for steps, _ in parts])
    values = [value for _, column in parts for value in column]
    order = np.argsort(steps_T, kind="stable")
    order = order[np.append(np.diff(steps_T[order]) > 0, True)]
    if all(isinstance(value, float) for value in values):
        return Series(steps_T[order], np.array(values)[order])
    rows = np.full((len(values), max(np.size(value) for value in values)), np.nan)
    for row, value in zip(rows, values, strict=True):
        row[: np.size(value)] = value
    return Series(steps_T[order], rows[order])


class _File:
    """What the lines of one file leave: columns of steps and values, cut where training was resumed."""

    def __init__(self, layers: dict[str, int]) -> None:
        self.header: dict[str, Any] = {}
        self.columns: dict[str, tuple[array[int], Any]] = {}
        self._layers = layers  # of all files of the run, in the order of their first lines
        self.events: list[Event] = []
        self.unreadable = 0
        self._last_step = -1
        self._resumed = False

    def read(self, lines: Iterable[str]) -> None:
        """Take the lines in order; a broken one, as a killed run leaves, is counted and passed over."""
        for text in lines:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                self.unreadable += bool(text.strip())
                continue
            if not isinstance(line, dict):
                self.unreadable += 1
            elif line.get("kind") == "run":
                self.header = line
                self._resumed = True
            elif (step := _integer(line.get("step"))) is not None:
                self._read_line(step, line)

    def _read_line(self, step: int, line: Mapping[str, Any]) -> None:
        kind = line.get("kind", "step")
        if self._resumed or (kind == "step" and step <= self._last_step):
            self._drop_from(step)
        self._resumed = False
        if kind == "event":
            self.events.append(_event(step, line))
        elif kind == "step":
            self._last_step = step
            self._read_step(step, line)

    def _drop_from(self, step: int) -> None:
        for steps, values in self.columns.values():
            first = bisect_left(steps, step)
            del steps[first:], values[first:]
        self.events = [event for event in self.events if event.step < step]
        self._last_step = min(self._last_step, step - 1)

    def _read_step(self, step: int, line: Mapping[str, Any]) -> None:
        for key, value in line.items():
            if isinstance(value, list):
                self._add(key, step, _vector(value))
            elif key == "parameters" and isinstance(value, dict):
                for name, numbers in _by_layer(value, self._layers).items():
                    self._add(name, step, _vector(numbers))
            elif key != "step" and math.isfinite(number := _number(value)):
                self._add(key, step, number)

    def _add(self, key: str, step: int, value: "float | Vector | None") -> None:
        if value is None:
            return
        empty: Any = array("d") if isinstance(value, float) else []
        steps, values = self.columns.setdefault(key, (array("q"), empty))
        if isinstance(value, float) == isinstance(values, array):  # what a key held first is what it holds
            steps.append(step)
            values.append(value)


def _number(value: Any) -> float:
    """As a float, or NaN for what is not a number."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def _integer(value: Any) -> int | None:
    number = _number(value)
    return int(number) if 0 <= number < 2**62 else None


def _vector(values: Sequence[Any]) -> Vector | None:
    """A row of numbers, or None for what is not one; null is NaN."""
    try:
        row = np.array(values, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        return None
    row[~np.isfinite(row)] = np.nan
    return row if row.ndim == 1 and row.size else None


def _event(step: int, line: Mapping[str, Any]) -> Event:
    ranks = line.get("ranks")
    numbers = (_integer(rank) for rank in ranks) if isinstance(ranks, list) else ()
    return Event(
        step,
        str(line.get("event", "")),
        _integer(line.get("worker")),
        str(line.get("what") or ""),
        _integer(line.get("since")),
        tuple(rank for rank in numbers if rank is not None),
        str(line.get("host") or ""),
    )


@cache
def layer_of(parameter: str) -> str:
    """The layer of a parameter's name: up to its first number, or without its last part."""
    numbered = re.match(r"(.*?\.\d+)\.", parameter)
    return numbered[1] if numbered else parameter.rpartition(".")[0] or parameter


def _by_layer(parameters: Mapping[str, Any], layers: dict[str, int]) -> dict[str, list[float]]:
    """Of each layer the norm of all its parameters, their mean agreement and their median noise scale."""
    grouped: dict[tuple[str, str], list[float]] = {}
    for name, numbers in parameters.items():
        layers.setdefault(layer := layer_of(name), len(layers))
        for key, value in numbers.items() if isinstance(numbers, dict) else ():
            if math.isfinite(number := _number(value)):
                grouped.setdefault((key, layer), []).append(number)
    joined = {"norm": lambda values: math.hypot(*values), "agreement": statistics.fmean}
    joined["noise_scale"] = statistics.median
    rows: dict[str, list[float]] = {}
    for (key, layer), values in grouped.items():
        if key in joined:
            row = rows.setdefault(f"layer_{key}", [math.nan] * len(layers))
            row[layers[layer]] = joined[key](values)
    return rows
