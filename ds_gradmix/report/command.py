"""The verb `ds_gradmix report`, and the same for a script that has just trained."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_gradmix.report.page import page
from ds_gradmix.report.read import ReadError, read_runs

HELP = "one page of what training runs recorded"
INSTALL = "pip install ds_gradmix[report]"


class ReportError(Exception):
    """Why there is no page, in one line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's own arguments."""
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a folder of *.jsonl files, or one file"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE.html")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Write the page and say where it is; the exit status, 2 where a run or the `report` extra is missing."""
    try:
        print(write(options.runs, options.output))
    except ReportError as error:
        print(f"ds_gradmix report: {error}", file=sys.stderr)
        return 2
    return 0


def write(runs: Sequence[Path], output: Path) -> str:
    """Write the page of these runs to a file, whole or not at all; returns a line that names it.

    Raises:
        ReportError: Bokeh is not installed, a run cannot be read, or the file cannot be written.
    """
    try:
        from bokeh.resources import Resources
    except ImportError:
        raise ReportError(f"a report needs Bokeh: {INSTALL}") from None
    try:
        bokeh = Resources("inline", minified=True, components=["bokeh", "bokeh-api"])
        text = page(read_runs(runs), "\n".join(bokeh.js_raw))
        partial = output.with_name(f"{output.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, output)
    except ReadError as error:
        raise ReportError(str(error)) from error
    except OSError as error:
        raise ReportError(f"{output}: cannot be written: {error.strerror}") from error
    return f"{output}: report, {output.stat().st_size / 1e6:.1f} MB; any browser opens it, without a network"
