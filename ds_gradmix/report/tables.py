"""The tables of the page that are no chart's: what the runs are, and what was noticed about workers."""

from collections.abc import Mapping, Sequence

import numpy as np

from ds_gradmix.report.chart import Table, number, plain, whole
from ds_gradmix.report.read import Event, Run

MAX_EVENTS = 400
LOSSES = ("training loss, mean of the last 2 %", "validation loss, last", "validation loss, least")
EVENTS: Mapping[str, str] = {"left out": "left out of the mix", "returned": "returned to the mix"}


def runs_table(runs: Sequence[Run]) -> Table:
    """A column for each run; rows that no run has something for are left out."""
    columns = [_about(run) for run in runs]
    rows = [[name, *(about[name] for about in columns)] for name in columns[0]]
    return Table(
        "What was recorded", ["", *(run.name for run in runs)], [row for row in rows if any(row[1:])]
    )


def _about(run: Run) -> dict[str, str]:
    numbers = {key: series for key, series in run.series.items() if series.values.ndim == 1}
    training, last, least = LOSSES
    about = dict.fromkeys(("steps", *LOSSES, "skipped steps", "workers", "samples of a step"), "")
    about["rules"] = plain(run.header.get("rules") or "")
    if run.series:
        ends_T = np.concatenate([series.steps_T[[0, -1]] for series in run.series.values()])
        about["steps"] = f"{whole(ends_T.min())} to {whole(ends_T.max())}"
    if loss := numbers.get("loss"):
        about[training] = number(float(np.mean(loss.values[-len(loss.values) // 50 :])))
    if loss := numbers.get("val_loss"):
        for key, place in ((last, -1), (least, int(loss.values.argmin()))):
            about[key] = f"{number(loss.values[place])} (step {whole(loss.steps_T[place])})"
    if skipped := numbers.get("skipped"):  # of telemetry a share of the steps since its line before
        about["skipped steps"] = whole(float(skipped.values @ np.diff(skipped.steps_T, prepend=0)))
    if isinstance(workers := run.header.get("workers"), list):
        about["workers"] = whole(len(workers))
    if batch := numbers.get("batch"):
        about["samples of a step"] = whole(batch.values[-1])
    told = bool(run.header or run.events)
    about["alarms"] = whole(sum(event.event == "alarm" for event in run.events)) if told else ""
    about["left out at the end"] = _left_out(run) or "none" * told
    about["lines that could not be read"] = str(run.unreadable or "")
    return about


def _left_out(run: Run) -> str:
    """The workers whose last such event says so."""
    last = {event.worker: event for event in run.events if event.event in EVENTS}
    out = [event for _, event in sorted(last.items(), key=repr) if event.event == "left out"]
    return "; ".join(
        f"worker {_text(event.worker)} ({_ranks(event)}, {_text(event.host)}) since step {_since(event)}"
        for event in out
    )


def _since(event: Event) -> str:
    return whole(event.step if event.since is None else event.since)


def _ranks(event: Event) -> str:
    """As a range where they are many."""
    ranks = event.ranks
    if len(ranks) > 2 and ranks == tuple(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if ranks else "–"


def _text(value: object) -> str:
    return "–" if value in (None, "") else plain(value)


def events_table(runs: Sequence[Run]) -> Table:
    """All alarms, exclusions and returns by run and step; of very many, the first and the last."""
    head = ["run", "step", "event", "what", "since step", "worker", "ranks", "host"]
    rows = []
    for run in runs:
        for event in run.events:
            row = [
                run.name,
                whole(event.step),
                EVENTS.get(event.event, plain(event.event)),
                _text(event.what),
            ]
            row += [
                _since(event),
                _text(event.worker),
                _ranks(event).partition(" ")[2] or "–",
                _text(event.host),
            ]
            rows.append(row)
    caption = "Alarms, exclusions and returns"
    if len(rows) > MAX_EVENTS:
        caption += f": the first and the last {MAX_EVENTS // 2} of {whole(len(rows))}"
        rows = rows[: MAX_EVENTS // 2] + rows[-MAX_EVENTS // 2 :]
    first = len(runs) == 1
    return Table(caption, head[first:], [row[first:] for row in rows])
