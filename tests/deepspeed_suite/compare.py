"""Outcomes of the same tests, without a block and with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

Outcomes = Mapping[str, str]  # "passed", "failed" or "skipped" by test


class Difference(NamedTuple):
    """A test that ended otherwise with the block, and why that is right, if it is."""

    test: str
    stock: str
    ours: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.test}: {self.stock}, with the block {self.ours}; {self.reason or 'UNEXPECTED'}"


def outcomes_of(report: Path) -> Outcomes:
    """What a JUnit report of pytest says; a test that fails and whose teardown fails too is there once."""
    found: dict[str, str] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcome = "passed" if not kinds else "skipped" if kinds == {"skipped"} else "failed"
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = "failed" if "failed" in (outcome, found.get(name)) else outcome
    return found


def differences(stock: Outcomes, ours: Outcomes, expected: Mapping[str, str]) -> list[Difference]:
    """Every test whose outcome is another; one that is in one report only is "missing" in the other."""
    found = []
    for test in sorted({*stock, *ours}):
        before, after = stock.get(test, "missing"), ours.get(test, "missing")
        if before != after:
            reason = next((why for part, why in expected.items() if part in test), None)
            found.append(Difference(test, before, after, reason))
    return found


def counts(outcomes: Outcomes) -> str:
    """How many of each outcome."""
    number = Counter(outcomes.values())
    return ", ".join(f"{number[kind]} {kind}" for kind in ("passed", "failed", "skipped") if number[kind])
