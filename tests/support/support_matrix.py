"""The support matrix of docs/parallelism.md, from the table that decides what is refused and that tests are
parametrised with. `python -m tests.support.documents` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ds_gradmix.config import SLOTS
from ds_gradmix.engines.compatibility import DTYPES, ENGINES, PARALLELISM, refused_engine, refused_rule


class Cell(NamedTuple):
    """A combination; its string is what its test is called."""

    engine: str
    dtype: str
    parallelism: str
    slot: str

    @property
    def reason(self) -> str | None:
        """Why it is refused, if it is."""
        return refused_engine(self.engine, self.dtype, PARALLELISM[self.parallelism])

    @property
    def exception(self) -> str | None:
        """Which of its rules is refused, if one is."""
        return None if self.reason else refused_rule(self.engine, self.slot)

    def __str__(self) -> str:
        return "-".join(self).replace(" and ", "+")


def cells() -> Iterator[Cell]:
    for engine in ENGINES:
        for dtype in DTYPES:
            for parallelism in PARALLELISM:
                for slot in SLOTS:
                    yield Cell(engine, dtype, parallelism, slot)


SUPPORTED = [cell for cell in cells() if cell.reason is None]


def table() -> str:
    """Rows are engines and dtypes, columns kinds of parallelism; a tick with a number: but for some rule."""
    reasons: list[str | None] = []
    lines = ["| engine | dtype | " + " | ".join(PARALLELISM) + " |", "|---" * (len(PARALLELISM) + 2) + "|"]
    for engine in ENGINES:
        for dtype in DTYPES:
            row = []
            for parallelism in PARALLELISM:
                here = [Cell(engine, dtype, parallelism, slot) for slot in SLOTS]
                found = {cell.reason for cell in here}
                refused = sorted((found | {cell.exception for cell in here}) - {None}, key=str)
                reasons += [reason for reason in refused if reason not in reasons]
                numbers = [f"({reasons.index(reason) + 1})" for reason in refused]
                row.append(" ".join(["✓"] * (None in found) + numbers))
            lines.append(f"| {engine} | {dtype} | " + " | ".join(row) + " |")
    notes = [f"({number}) {reason}." for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes]) + "\n"
