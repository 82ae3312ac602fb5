"""The charts of one run with a row for each worker or layer, columns for steps, and colours for numbers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ds_gradmix.report.chart import SPECIFIED, Chart, Key, Table, listed, number, plain, whole
from ds_gradmix.report.downsample import columns, most_unusual
from ds_gradmix.report.read import Event, Floats, Run, Series

MAX_ROWS = 64
MAX_MARKS = 500
ROW_PIXELS = 17
SIGNS = {"alarm": ("▲", "triangle"), "left out": ("✕", "x"), "returned": ("○", "circle")}
# Names of page.css's colours at equal distances, from the least number to the greatest: what is amiss is hot.
DIVERGING = [f"var(--{name})" for name in ("cold", "cool", "middle", "warm", "hot")]
REVERSED = DIVERGING[::-1]
KEPT = REVERSED[:3]
RISING = [f"var(--rise-{place})" for place in range(5)]


class Scale(NamedTuple):
    """How numbers become colours, and what stands beside the bar of colours."""

    unit: str
    colors: list[str]
    ticks: list[float]  # from the least number to the greatest
    texts: list[str]
    base: float = 0.0  # of the logarithms that cells are; 0: they are none


class _Rows(NamedTuple):
    what: str
    short: list[str]
    full: list[str]
    events: Sequence[Event]


def worker_maps(run: Run, name: str) -> list[Chart]:
    """Norms, agreement with the others, and what was kept, of each worker and as far as recorded."""
    keys = ("worker_norm", "worker_agreement", "worker_kept")
    width = max((series.values.shape[1] for key in keys if (series := _of(run, key))), default=0)
    rows = _Rows("worker", *_names_of_workers(run, width), run.events)
    return _charts(run, name, rows, keys)


def layer_maps(run: Run, name: str) -> list[Chart]:
    """The same for layers, from telemetry with numbers of each parameter."""
    rows = _Rows("layer", [plain(layer) for layer in run.layers], run.layers, [])
    return _charts(run, name, rows, ("layer_agreement", "layer_norm", "layer_noise_scale"))


def _charts(run: Run, name: str, rows: _Rows, keys: Sequence[str]) -> list[Chart]:
    found = []
    for key in keys:
        change, scale_of = _KINDS[key]
        series = _of(run, key)
        changed = None if series is None else Series(series.steps_T, change(series.values))
        if changed is not None and np.isfinite(changed.values).any():
            scale = scale_of(np.nanquantile(changed.values, [0.001, 0.999]))
            found.append(
                _chart(f"{name}-{key.replace('_', '-')}", SPECIFIED["maps"][key], rows, changed, scale)
            )
    return found


def _of(run: Run, key: str) -> Series | None:
    series = run.series.get(key)
    return series if series is not None and series.values.ndim > 1 else None


def _names_of_workers(run: Run, width: int) -> tuple[list[str], list[str]]:
    """Short and in full, from telemetry's header as far as it goes."""
    short, full = [str(i) for i in range(width)], [f"worker {i}" for i in range(width)]
    described = run.header.get("workers")
    for place, worker in enumerate(described[:width] if isinstance(described, list) else ()):
        about = worker if isinstance(worker, dict) else {}
        ranks, hosts = (
            [plain(each) for each in about[key]] if isinstance(about.get(key), list) else []
            for key in ("ranks", "hosts")
        )
        if hosts:
            short[place] += f" · {hosts[0]}" + f" +{len(hosts) - 1}" * (len(hosts) > 1)
        full[place] += f", rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}" * bool(ranks)
        full[place] += f", {', '.join(hosts)}" * bool(hosts)
    return short, full


def _log2(values: Floats) -> Floats:
    logs: Floats = np.log2(np.where(values > 0, values, np.nan))
    return logs


def _centred(logs: Floats, axis: int) -> Floats:
    """Without their median: values are then relative to it."""
    known = np.isfinite(logs).any(axis, keepdims=True)
    centred: Floats = logs - np.nanmedian(np.where(known, logs, 0.0), axis, keepdims=True)
    return centred


def _ratio_scale(ends: Floats) -> Scale:
    """The same number of doublings on both sides of 1, as many as nearly all numbers need."""
    most = int(min(max(np.ceil(np.abs(ends).max()), 1), 6))
    powers = list(range(-most, most + 1))
    texts = [f"1/{2**-power}×" if power < 0 else f"{2**power}×" for power in powers]
    return Scale("× median", DIVERGING, [float(power) for power in powers], texts, base=2.0)


def _cosine_scale(ends: Floats) -> Scale:
    """Around 0, and as wide as nearly all numbers: most cosines are small."""
    most = next(most for most in (0.05, 0.1, 0.2, 0.5, 1.0) if np.abs(ends).max() <= most or most == 1.0)
    ticks = [-most, -most / 2, 0, most / 2, most]
    return Scale("cosine", REVERSED, ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])


def _power_scale(ends: Floats) -> Scale:
    least = int(np.floor(ends[0] * np.log10(2)))
    powers = range(least, max(int(np.ceil(ends[1] * np.log10(2))), least + 1) + 1)
    return Scale(
        "samples",
        RISING,
        [power / float(np.log10(2)) for power in powers],
        [number(10.0**p) for p in powers],
        2.0,
    )


def _same(values: Floats) -> Floats:
    return values


# What becomes of the numbers of a key, and the scale for their least and greatest, as far as these are usual.
_KINDS: dict[str, tuple[Callable[[Floats], Floats], Callable[[Floats], Scale]]] = {
    "worker_norm": (lambda values: _centred(_log2(values), 1), _ratio_scale),
    "worker_agreement": (_same, _cosine_scale),
    "worker_kept": (_same, lambda _: Scale("kept", KEPT, [0, 0.5, 1], ["0", "½", "1"])),
    "layer_agreement": (_same, _cosine_scale),
    # Without what all layers share at a step, and what a layer always has.
    "layer_norm": (lambda values: _centred(_centred(_centred(_log2(values), 1), 0), 1), _ratio_scale),
    "layer_noise_scale": (_log2, _power_scale),
}


def _chart(name: str, words: dict[str, str], rows: _Rows, series: Series, scale: Scale) -> Chart:
    title, note = words["title"], words["note"]
    first, width, cells = columns(series)
    shown = most_unusual(cells, MAX_ROWS)
    if len(shown) < len(cells):
        note += f" Shown: the {len(shown)} of {len(cells)} {rows.what}s that stray furthest from the others."
    marks, keys = _marks(rows.events, {int(row): place for place, row in enumerate(shown)})
    meant = scale.base ** cells[shown] if scale.base else cells[shown]
    heat = {
        "first": first - width / 2,
        "width": width,
        "labels": [rows.short[row] for row in shown],
        "names": [plain(rows.full[row]) for row in shown],
        "cells": listed(cells[shown], 4),
        "meant": [[number(value) for value in row] for row in meant],
        **scale._asdict(),
    }
    figure = {"heat": heat, "marks": marks, "axis": rows.what, "height": 96 + ROW_PIXELS * max(4, len(shown))}
    table = _table(title, rows, series, shown, scale)
    return Chart(name, title, note, _words(rows.what, series, table), figure, table, keys)


def _marks(events: Sequence[Event], places: dict[int, int]) -> tuple[list[dict[str, Any]], list[Key]]:
    """Signs at the steps and workers of events."""
    marks, keys = [], []
    for event, (sign, marker) in SIGNS.items():
        at = [(each, places[each.worker]) for each in events if each.event == event and each.worker in places]
        if at := at[:MAX_MARKS]:
            texts = [plain(f"{event}: {each.what}" if each.what else event) for each, _ in at]
            rows, steps = [row for _, row in at], [each.step for each, _ in at]
            marks.append({"marker": marker, "x": steps, "row": rows, "text": texts})
            keys.append(Key(event, "var(--mark)", sign=sign))
    return marks, keys


def _table(title: str, rows: _Rows, series: Series, shown: Any, scale: Scale) -> Table:
    found = []
    for row in shown:
        known = np.isfinite(series.values[:, row])
        steps_T, values = series.steps_T[known], series.values[known, row]
        if len(values):
            picked = [values.min(), float(np.median(values)), values.max(), values[-1]]
            texts = [number(scale.base**value if scale.base else value) for value in picked]
            least, greatest = (whole(steps_T[place]) for place in (values.argmin(), values.argmax()))
            found.append([plain(rows.full[row]), texts[0], least, texts[1], texts[2], greatest, texts[3]])
    head = [rows.what, "least", "at step", "median", "greatest", "at step", "last"]
    return Table(f"{title}, in {scale.unit}" if scale.base else title, head, found)


def _words(what: str, series: Series, table: Table) -> str:
    """A sentence for each of a few rows; the table has all."""
    first, last = (whole(step) for step in series.steps_T[[0, -1]])
    said = [
        f"{row[0]}: least {row[1]}, median {row[3]}, greatest {row[4]}, last {row[6]}." for row in table.rows
    ]
    more = f" The table has the other {len(said) - 8}." if len(said) > 8 else ""
    return f"Heat map of {len(said)} {what}s over steps {first} to {last}. {' '.join(said[:8])}{more}"
