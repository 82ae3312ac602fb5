"""How the commands print for people: columns, 100 characters a line, what to type next."""

import shlex
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from ds_gradmix.config_messages import printable

WIDTH = 100


def wrapped(lines: Iterable[str]) -> Iterator[str]:
    """The lines, of which one that is too long goes on in the next, indented by two more than it is."""
    for line in lines:
        indent = len(line) - len(line.lstrip()) + 2
        yield from _fill(line, indent) or [""]


def columns(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Names and texts in two columns; a text that is too long goes on below itself."""
    width = max(len(name) for name, _ in rows) + 2
    for name, text in rows:
        yield from _fill(f"  {name:{width}}{text}", width + 2)


def next_command(*words: str) -> Iterator[str]:
    """The line that says what to type next, in two lines if it is too long for one."""
    line = "next: " + shlex.join(map(printable, words))
    if len(line) > WIDTH and len(words) > 2:
        first, second = words[:-2], words[-2:]
        yield f"next: {shlex.join(map(printable, first))} \\"
        line = "      " + shlex.join(map(printable, second))
    yield line


def _fill(line: str, indent: int) -> list[str]:
    return textwrap.wrap(
        line, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
