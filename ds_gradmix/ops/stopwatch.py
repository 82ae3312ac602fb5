"""How long our own part of a step takes, without making the host wait for a GPU while it is measured."""

import time
from collections.abc import Callable
from typing import Any

import torch

_SPANS_KEPT = 64


class Stopwatch:
    """A context manager that may be entered inside of itself; `timer`, if any, starts and stops with it.

    On a GPU the time is between two events on the stream. It is read once in a while.
    """

    def __init__(self, device: torch.device) -> None:
        self.timer: Any = None  # with start() and stop()
        self.is_on = True
        self._is_cuda = device.type == "cuda"
        self._depth = 0
        self._began: Any = None
        self._spans: list[tuple[Any, Any]] = []
        self._seconds = 0.0

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._start()

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._stop()

    def pause(self, call: Callable[[], object]) -> None:
        """Do what is not our part."""
        if self._depth > 0:
            self._stop()
        try:
            call()
        finally:
            if self._depth > 0:
                self._start()

    def _start(self) -> None:
        if self.is_on:
            self._began = self._now()
        if self.timer is not None:
            self.timer.start()

    def _stop(self) -> None:
        if self.is_on and self._is_cuda:
            self._spans.append((self._began, self._now()))
            while len(self._spans) > _SPANS_KEPT and self._spans[0][1].query():  # is over: nobody waits
                began, ended = self._spans.pop(0)
                self._seconds += began.elapsed_time(ended) / 1e3
        elif self.is_on:
            self._seconds += self._now() - self._began
        if self.timer is not None:
            self.timer.stop()

    def _now(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> float:
        """The seconds since the last reading; the host waits for the device here."""
        for began, ended in self._spans:
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1e3
        self._spans.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds
