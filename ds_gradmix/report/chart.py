"""What a chart of the page is made of, and how its numbers and names are written."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np

# Titles, axes and notes: of sections of line charts, and of heat maps by their key.
SPECIFIED: dict[str, Any] = json.loads((files(__package__) / "charts.json").read_text("utf-8"))


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a sample of the line, or a sign, in a colour of page.css."""

    label: str
    color: str
    dash: str = "solid"
    sign: str = ""


@dataclass
class Table:
    """The numbers of a chart as text."""

    caption: str
    head: Sequence[str]
    rows: list[list[str]]


@dataclass
class Chart:
    """What page.js draws by Bokeh, and what says the same in words; nothing of it is escaped yet."""

    name: str  # unique in the page
    title: str
    note: str  # how to read it
    summary: str  # for those who do not see it
    figure: dict[str, Any]  # "lines", or "heat" and "marks", and the axes'
    table: Table
    keys: list[Key] = field(default_factory=list)


def plain(text: object) -> str:
    """Data as one line of text."""
    return " ".join(str(text).split())


def number(value: float) -> str:
    """For a reader: four significant digits, thousands apart, and no exponent where none is needed."""
    if not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e4:
        text = f"{value:,.0f}"
    elif 1e-3 <= abs(value) < 1e4:
        text = f"{value:#.4g}".rstrip(".")
    elif 1e4 <= abs(value) < 1e9:
        text = f"{float(f'{value:.4g}'):,.0f}"
    else:
        text = f"{value:.3e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return text.replace("-", "−")


def whole(value: float) -> str:
    """A step or a count."""
    return f"{round(value):,}"


def listed(values: Any, digits: int = 5) -> list[Any]:
    """An array as JSON has it: significant digits that a screen can show, and null for NaN."""
    array = np.asarray(values)
    if array.ndim > 1:
        return [listed(row, digits) for row in array]
    if array.dtype.kind == "i":
        return [int(value) for value in array]
    texts = (f"{value:.{digits}g}" if math.isfinite(value) else "" for value in array.tolist())
    return [None if not text else float(text) for text in texts]
