"""The report of runs: what is read, what a long run keeps of itself, and that data never becomes markup."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradmix_pretrain import metrics

from ds_gradmix.cli import main
from ds_gradmix.report import chart, command, downsample, heatmaps
from ds_gradmix.report.heatmaps import layer_maps, worker_maps
from ds_gradmix.report.page import page
from ds_gradmix.report.read import ReadError, Run, Series, read_runs
from tests.support.telemetry import header, write_run

NASTY = "<script>document.title='taken'</script>"


def write(path: Path, *lines: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def read(*lines: Any, folder: Path) -> Run:
    (run,) = read_runs([write(folder / "gradmix.jsonl", *lines)])
    return run


def step(number: int, **numbers: Any) -> dict[str, Any]:
    return {"kind": "step", "step": number, **numbers}


def alarm(number: int, worker: int = 3, **more: Any) -> dict[str, Any]:
    about = {"event": "alarm", "worker": worker, "ranks": [worker], "host": "node-a", "what": "exploding"}
    return {"kind": "event", "step": number, "since": number - 1, **about, **more}


def pairs(run: Run, key: str) -> list[tuple[int, float]]:
    return list(zip(run.series[key].steps_T.tolist(), run.series[key].values.tolist(), strict=True))


def test_files_of_a_folder_are_merged_by_step(tmp_path: Path) -> None:
    write(tmp_path / "run" / "gradmix.jsonl", header(2, 2), step(2, lr=0.5, worker_kept=[1, 0.5]))
    lines = ({"step": i, "loss": i / 2, "skipped": i == 1, "grad_norm": None} for i in (1, 2, 3))
    write(tmp_path / "run" / "metrics.jsonl", *lines)
    (run,) = read_runs([tmp_path / "run"])
    assert run.name == "run" and run.header["samples_per_worker"] == 8
    assert pairs(run, "loss") == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert pairs(run, "lr") == [(2, 0.5)] and pairs(run, "worker_kept") == [(2, [1.0, 0.5])]
    assert pairs(run, "skipped") == [(1, 1.0), (2, 0.0), (3, 0.0)] and "grad_norm" not in run.series


def test_of_a_step_in_several_files_the_last_file_counts(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", step(1, loss=1.0, worker_norm=[1]), step(3, loss=3.0))
    write(tmp_path / "b.jsonl", step(2, loss=2.0), step(3, loss=4.0, worker_norm=[1, None]))
    (run,) = read_runs([tmp_path])
    assert pairs(run, "loss") == [(1, 1.0), (2, 2.0), (3, 4.0)]
    np.testing.assert_equal(run.series["worker_norm"].values, [[1, np.nan], [1, np.nan]])


def test_a_resumed_run_drops_what_was_trained_again(tmp_path: Path) -> None:
    """Also events, and only those after the step that it was resumed at."""
    before = [step(10, a=1.0), alarm(12), step(20, a=2.0, worker_norm=[2.0]), alarm(25), step(30, a=3.0)]
    after = [header(2, 10), step(20, a=5.0), alarm(24, worker=1), step(30, a=6.0)]
    run = read(header(4, 10), *before, *after, folder=tmp_path)
    assert pairs(run, "a") == [(10, 1.0), (20, 5.0), (30, 6.0)]
    assert "worker_norm" not in run.series
    assert [(event.step, event.worker) for event in run.events] == [(12, 3), (24, 1)]
    assert len(run.header["workers"]) == 2
    without_header = read(*before, step(20, a=5.0), folder=tmp_path)
    assert pairs(without_header, "a") == [(10, 1.0), (20, 5.0)] and len(without_header.events) == 1
    first_an_event = read(header(4, 10), *before, header(4, 10), alarm(13), step(20, a=5.0), folder=tmp_path)
    assert [event.step for event in first_an_event.events] == [12, 13]
    assert pairs(first_an_event, "a") == [(10, 1.0), (20, 5.0)]


def test_broken_lines_and_odd_values_are_passed_over(tmp_path: Path) -> None:
    odd = step(
        2, a="high", b=float("nan"), c=[1, "x"], d=[[1]], e=10**400, f=[], worker_norm=[1, None, 10**400]
    )
    lines = [
        step(1, a=1.0),
        "[1, 2]\n",
        "\n",
        {"text": "a corpus"},
        {"step": "x", "a": 2},
        odd,
        '{"kind": "st',
    ]
    run = read(*lines, folder=tmp_path)
    assert pairs(run, "a") == [(1, 1.0)] and set(run.series) <= {"a", "worker_norm"}
    assert run.unreadable == 2
    again = read(
        step(1, a=1.0),
        '{"kind": "step", "st' + json.dumps(step(2, a=2.0)) + "\n",
        step(3, a=3.0),
        folder=tmp_path,
    )
    assert pairs(again, "a") == [(1, 1.0), (3, 3.0)] and again.unreadable == 1


def test_a_number_that_becomes_a_list_and_back(tmp_path: Path) -> None:
    run = read(step(1, a=1.0), step(2, a=[1, 2]), step(3, a=3.0), folder=tmp_path)
    assert pairs(run, "a") == [(1, 1.0), (3, 3.0)]


def test_parameters_are_joined_by_layer(tmp_path: Path) -> None:
    def about(norm: float, cosine: float, noise: float) -> dict[str, float]:
        return {"norm": norm, "agreement": cosine, "noise_scale": noise}

    first = {"m.layers.0.q.weight": about(3, 0.1, 1), "m.layers.0.o.weight": about(4, 0.3, 5)}
    second = {**first, "head.weight": {"norm": 2.0, "agreement": None}, "bias": about(1, 0, 1)}
    run = read(step(1, parameters=first), step(2, parameters=second), folder=tmp_path)
    assert run.layers == ["m.layers.0", "head", "bias"]
    np.testing.assert_allclose(run.series["layer_norm"].values, [[5, np.nan, np.nan], [5, 2, 1]])
    np.testing.assert_allclose(run.series["layer_agreement"].values[1], [0.2, np.nan, 0], atol=1e-7)
    np.testing.assert_allclose(run.series["layer_noise_scale"].values[1], [3, np.nan, 1])


def test_names_of_runs_differ(tmp_path: Path) -> None:
    files = [write(tmp_path / name / "run" / "a.jsonl", step(1, a=1.0)) for name in ("x", "y")]
    assert [run.name for run in read_runs([files[0], files[0].parent])] == ["run/a.jsonl", "run"]
    assert [run.name for run in read_runs([file.parent for file in files])] == [
        str(file.parent) for file in files
    ]
    assert len({run.name for run in read_runs([files[0], files[0]])}) == 2


@pytest.mark.parametrize("missing", ["nothing", "no files", "no steps"])
def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    pytest.importorskip("bokeh")
    run = tmp_path / "run"
    if missing != "nothing":
        run.mkdir()
    if missing == "no steps":
        write(run / "a.jsonl", header(2, 1), "not JSON")
    assert main(["report", str(run), "-o", str(tmp_path / "report.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ds_gradmix report: {run}: ") and not (tmp_path / "report.html").exists()


def test_without_the_extra_or_a_folder_to_write_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bokeh")
    run = write(tmp_path / "a.jsonl", step(1, loss=1.0))
    assert main(["report", str(run), "-o", str(tmp_path / "none" / "report.html")]) == 2
    assert "cannot be written: No such file" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "bokeh.resources", None)
    assert main(["report", str(run), "-o", str(tmp_path / "report.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install ds_gradmix[report]" in line
    assert "pip install ds_gradmix[report]" in metrics.write_report(tmp_path)


def test_a_script_that_has_trained_gets_its_report(tmp_path: Path) -> None:
    pytest.importorskip("bokeh")
    write(tmp_path / "metrics.jsonl", step(1, loss=1.0))
    assert metrics.write_report(tmp_path).startswith(f"{tmp_path / 'report.html'}: report, ")
    assert (tmp_path / "report.html").exists() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("total", [1, 2, 1999, 2000, 2001, 100_000])
def test_lines_keep_ends_and_extremes(total: int) -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(size=total)
    for spike, size in ((total // 3, 50.0), (total // 2, -70.0)):
        values[spike] = size
    series = Series(np.arange(total) * 7, values)
    thin = downsample.thinned(series)
    assert len(thin.steps_T) == min(total, len(thin.steps_T)) <= downsample.MAX_POINTS
    assert (np.diff(thin.steps_T) > 0).all() and {0, (total - 1) * 7} <= set(thin.steps_T.tolist())
    assert thin.values.min() == values.min() and thin.values.max() == values.max()
    np.testing.assert_array_equal(thin.values, values[thin.steps_T // 7])


def test_smoothing_is_a_centred_mean() -> None:
    ramp = Series(np.arange(1000), np.arange(1000.0))
    np.testing.assert_allclose(downsample.smoothed(ramp, 0.1).values[50:-50], ramp.values[50:-50])
    flat = downsample.smoothed(Series(ramp.steps_T, np.full(1000, 3.0)), 0.1)
    np.testing.assert_allclose(flat.values, 3.0)


def test_heat_maps_keep_a_fault_of_one_step() -> None:
    draw = np.random.default_rng(0)
    values = 0.2 + 0.02 * draw.normal(size=(10_000, 8))
    values[7_777, 3] = -1.0
    values[:, 5] = np.nan
    first, width, cells = downsample.columns(Series(np.arange(1, 10_001) * 10, values))
    assert first == 10 and cells.shape == (8, downsample.MAX_COLUMNS)
    row, column = np.unravel_index(np.nanargmin(cells), cells.shape)
    assert (row, cells[row, column]) == (3, -1.0)
    assert abs(first + column * width - 77_780) <= width
    assert np.isnan(cells[5]).all()
    others = np.delete(np.delete(cells, 5, 0), column, 1)
    assert np.abs(others - 0.2).max() < 0.03, "others are means"


def test_heat_maps_of_few_and_of_irregular_steps() -> None:
    one = downsample.columns(Series(np.array([5]), np.array([[1.0, 2.0]])))
    assert one[:2] == (5.0, 1.0) and one[2].tolist() == [[1.0], [2.0]]
    steps = np.array([0, *range(100, 2000, 10), *range(2000, 4000, 50)])
    _, width, cells = downsample.columns(Series(steps, np.ones((len(steps), 2))))
    assert width >= 50 and not np.isnan(cells[0, int(300 / width) :]).any(), (
        "no stripes where lines are sparse"
    )


def test_of_many_workers_the_unusual_are_shown(tmp_path: Path) -> None:
    norms = [1.0] * 300
    norms[271] = 9.0
    run = read(header(300, 1), *(step(i, worker_norm=norms) for i in (1, 2)), folder=tmp_path)
    (norm,) = worker_maps(run, "workers")
    labels = norm.figure["heat"]["labels"]
    assert len(labels) == heatmaps.MAX_ROWS and "271 · node-68" in labels
    assert "of 300 workers" in norm.note


def test_colours_are_centred(tmp_path: Path) -> None:
    """Norms at the step's median, cosines at 0; an equal step on both sides has an equal distance."""
    lines = [step(i, worker_norm=[1, 2, 4, None], worker_agreement=[0.4, 0.1, -0.1, 0]) for i in (1, 2)]
    norm, agreement = worker_maps(read(header(4, 1), *lines, folder=tmp_path), "workers")
    assert norm.figure["heat"]["cells"] == [[-1, -1], [0, 0], [1, 1], [None, None]]
    assert (
        norm.figure["heat"]["meant"][0] == ["0.5000", "0.5000"] and norm.figure["heat"]["meant"][3][0] == "–"
    )
    assert [norm.figure["heat"]["ticks"], norm.figure["heat"]["texts"]] == [[-1, 0, 1], ["1/2×", "1×", "2×"]]
    assert agreement.figure["heat"]["ticks"] == [-0.5, -0.25, 0, 0.25, 0.5]
    assert norm.figure["heat"]["colors"] == agreement.figure["heat"]["colors"][::-1]


def test_layers_are_compared_with_other_layers(tmp_path: Path) -> None:
    """A norm that all layers share, and one that a layer always has, are no news."""

    def line(number: int) -> dict[str, Any]:
        sizes = {f"l.{i}.w": (i + 1) * 2.0**-number * (8 if i == 1 and number == 2 else 1) for i in range(3)}
        return step(number, parameters={name: {"norm": size} for name, size in sizes.items()})

    (norm,) = layer_maps(read(*map(line, range(5)), folder=tmp_path), "layers")
    np.testing.assert_allclose(norm.figure["heat"]["cells"], [[0] * 5, [0, 0, 3, 0, 0], [0] * 5], atol=1e-3)


class Elements(HTMLParser):
    """The elements and attributes of a page, and the headings' levels."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_names_are_data(tmp_path: Path) -> None:
    """Of hosts, rules, runs, parameters and events: the page has no element more than with plain names."""

    def text(name: str) -> str:
        about = {**header(2, 1), "rules": name, "workers": [{"worker": 0, "ranks": [0], "hosts": [name] * 2}]}
        lines = [step(i, loss=1.0, worker_norm=[1, 2], parameters={name: {"norm": i}}) for i in (1, 2)]
        events = [
            alarm(1, 0, host=name, what=name),
            alarm(2, 0, event=name),
            alarm(2, 1, event="left out", host=name),
        ]
        run = read(about, *lines, *events, folder=tmp_path)
        run.name = name
        return page([run, run], "")

    nasty, quiet = text(NASTY + "\"' onload='x'"), text("plain")
    assert "taken" in nasty and NASTY not in nasty
    nasty, quiet = Elements(nasty), Elements(quiet)
    assert nasty.tags == quiet.tags
    assert [name for name, _ in nasty.attributes] == [name for name, _ in quiet.attributes]


def test_page_is_deterministic_and_complete(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=4000, every=20)
    text = page(read_runs([tmp_path / "run"]), "BOKEH")
    assert text == page(read_runs([tmp_path / "run"]), "BOKEH")
    titles = re.findall(r"<h2 [^>]*>(.*?)</h2>", text)
    assert titles == [
        "Runs",
        "Alarms and exclusions",
        "Losses and learning rate",
        "Agreement between workers",
        "Noise scale",
        "Scaling",
        "Workers",
        "Layers",
        "Cost",
    ]
    figures = json.loads(re.findall(r'id="figures">(.*?)</script>', text)[0])
    assert len(figures) == len(re.findall('role="img"', text)) == text.count("<details>") == 17
    tokens = {line["name"]: line["y"] for line in figures["noise_tokens"]["lines"]}
    assert tokens["tokens of a step"] == [8 * 8 * 1024] * 2
    assert "worker 3 (rank 3, node-01) since step 3,001" in text
    assert re.search(
        r"<th scope=.row.>3,100</th><td>alarm</td><td>pointing away</td><td>3,001</td><td>3</td>", text
    )
    assert len(set(re.findall(r' id="([^"]*)"', text))) == len(re.findall(r' id="', text))


def test_without_telemetry_there_is_what_there_is(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", *({"step": i, "loss": 1 / i, "lr": 0.1} for i in range(1, 6)))
    text = page(read_runs([tmp_path]), "")
    assert "Not recorded: without telemetry" in text and 'id="losses-and-learning-rate"' in text
    assert 'id="workers"' not in text and 'id="noise-scale"' not in text
    write(tmp_path / "metrics.jsonl", alarm(3))
    only_events = page(read_runs([tmp_path]), "")
    assert "exploding" in only_events and "<script" not in only_events


def test_numbers_are_written_for_readers() -> None:
    texts = {
        0: "0",
        8: "8",
        0.00031: "3.100e−4",
        2.4: "2.400",
        -0.125: "−0.1250",
        1000: "1,000",
        12345.6: "12,350",
        1e12: "1.000e12",
        float("nan"): "–",
    }
    assert {value: chart.number(value) for value in texts} == texts
    assert command.INSTALL == "pip install ds_gradmix[report]"


def test_an_unreadable_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(ReadError, match="cannot be read: Is a directory"):
        read_runs([tmp_path])
