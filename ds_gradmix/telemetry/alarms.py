"""Alarms: a worker that looks faulty over many steps, in words, once."""

from collections.abc import Sequence
from typing import NamedTuple

from ds_gradmix.telemetry.measures import Reading
from ds_gradmix.telemetry.settings import TelemetrySettings

EXIT_STATUS = 17  # with `"on_alarm": "stop"`

_WORDS = {
    "nonfinite": "not finite",
    "long": "exploding",
    "short": "vanishing",
    "stuck": "stuck",
    "same": "same as another worker's",
}


class Place(NamedTuple):
    """The ranks that make a worker, and their hosts."""

    ranks: Sequence[int]
    hosts: Sequence[str]

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        return f"rank{'s' if len(self.ranks) > 1 else ''} {ranks} on {', '.join(self.hosts)}"


class Alarm(NamedTuple):
    """A worker's gradients look as `what` says, since a step."""

    worker: int
    step: int
    since: int
    what: tuple[str, ...]
    partner: int | None  # the worker whose gradients are the same

    def sentence(self, places: Sequence[Place]) -> str:
        """For a log: who, where, since when, and what it looks like."""
        what = " and ".join(self.what)
        if self.partner is not None:
            what = what.replace("another worker's", f"those of {places[self.partner]} (the same data?)")
        return f"step {self.step}: {places[self.worker]} looks faulty since about step {self.since}: {what}"


class Alarms:
    """Remembers which workers have been warned of, so that it is done once for as long as it lasts."""

    def __init__(self, settings: TelemetrySettings, num_workers: int, *, scales_loss: bool) -> None:
        # An overflow now and then is how a dynamic loss scale finds its value.
        self._needed = {"nonfinite": 5 if scales_loss else 1}
        self._steps = settings.alarm_steps
        self._known = [False] * num_workers

    def hear(self, reading: Reading, step: int) -> list[Alarm]:
        """The alarms that a reading gives cause for."""
        found = []
        for worker, known in enumerate(self._known):
            kinds = [
                kind
                for kind, runs in reading.runs.items()
                if runs[worker] >= self._needed.get(kind, self._steps)
            ]
            if not any(runs[worker] for runs in reading.runs.values()):
                self._known[worker] = False
            if kinds and not known:
                self._known[worker] = True
                since = min(reading.since[kind][worker] for kind in kinds)
                what = tuple(dict.fromkeys(self._words(kind, worker, reading) for kind in kinds))
                partner = reading.nearest[worker] if "same" in kinds else None
                found.append(Alarm(worker, step, since, what, partner))
        return found

    @staticmethod
    def _words(kind: str, worker: int, reading: Reading) -> str:
        if kind != "disagreeing":
            return _WORDS[kind]
        return "pointing away" if reading.points_away[worker] else "never agreeing"
