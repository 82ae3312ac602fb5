"""One HTML file of charts and tables: Bokeh, figures, style and script are in it, so it needs no network.

Names of hosts, rules and parameters are data. Jinja, which Bokeh depends on, escapes what becomes HTML. In
the figures, which stand in a script element, `<` is written as `\\u003c`, and Bokeh shows text as text.
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

from ds_gradmix.report.chart import Chart, Key
from ds_gradmix.report.heatmaps import layer_maps, worker_maps
from ds_gradmix.report.lines import NUM_COLORS, line_chart, sections
from ds_gradmix.report.read import Run
from ds_gradmix.report.tables import events_table, runs_table


class Part(NamedTuple):
    """Charts under a heading, or under none but the section's."""

    heading: str
    charts: list[Chart]


def page(runs: Sequence[Run], bokeh: str) -> str:
    """The page of these runs, with Bokeh's JavaScript; the same text for the same input."""
    from jinja2 import Environment

    parts = {
        title: [Part("", [chart for kind in kinds if (chart := line_chart(kind, runs)) is not None])]
        for title, kinds in sections()
    }
    costs = parts.pop("Cost")  # stands last
    for title, maps in (("Workers", worker_maps), ("Layers", layer_maps)):
        of_runs = [(run.name, maps(run, f"{title.lower()}-{place}")) for place, run in enumerate(runs)]
        parts[title] = [Part(name if len(runs) > 1 else "", charts) for name, charts in of_runs if charts]
    parts["Cost"] = costs
    shown = {title: found for title, found in parts.items() if any(part.charts for part in found)}
    figures = {
        chart.name: chart.figure for found in shown.values() for part in found for chart in part.charts
    }
    template, style, script = (
        (files(__package__) / f"page.{name}").read_text("utf-8") for name in ("html", "css", "js")
    )
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        runs=runs,
        about=runs_table(runs),
        events=events_table(runs),
        recorded=any(run.header for run in runs),
        sections=shown,
        samples=[Key(run.name, f"var(--line-{place % NUM_COLORS})") for place, run in enumerate(runs)],
        style=style,
        script=script,
        bokeh=bokeh,
        figures=json.dumps(figures, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    )
