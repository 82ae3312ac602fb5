"""The verdict of tests/deepspeed_suite, and what it says where it cannot run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.deepspeed_suite import inject, run
from tests.deepspeed_suite.compare import Difference, counts, differences, outcomes_of

REPORT = """<testsuites><testsuite>
<testcase classname="unit.a.TestA" name="test_one[2]"/>
<testcase classname="unit.a.TestA" name="test_two"><failure message="x">trace</failure></testcase>
<testcase classname="unit.a.TestA" name="test_two"><error message="teardown">trace</error></testcase>
<testcase classname="unit.a" name="test_three"><skipped message="no GPU"/></testcase>
<testcase classname="unit.a" name="test_four"><error message="x">trace</error></testcase>
<testcase classname="unit.a" name="test_four"/>
</testsuite></testsuites>"""


def test_outcomes_of_a_report(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    found = outcomes_of(tmp_path / "report.xml")
    assert found == {
        "unit.a.TestA::test_one[2]": "passed",
        "unit.a.TestA::test_two": "failed",
        "unit.a::test_three": "skipped",
        "unit.a::test_four": "failed",
    }
    assert counts(found) == "1 passed, 2 failed, 1 skipped"


def test_differences_and_their_reasons() -> None:
    stock = {"a": "passed", "b": "failed", "c": "passed", "d": "passed", "e": "skipped"}
    ours = {"a": "passed", "b": "failed", "c": "failed", "d": "failed", "f": "passed"}
    found = differences(stock, ours, {"d": "it counts calls of all_reduce"})
    assert found == [
        Difference("c", "passed", "failed", None),
        Difference("d", "passed", "failed", "it counts calls of all_reduce"),
        Difference("e", "skipped", "missing", None),
        Difference("f", "missing", "passed", None),
    ]
    assert str(found[0]) == "c: passed, with the block failed; UNEXPECTED"
    assert differences(stock, stock, {}) == []


@pytest.mark.parametrize("folder, words", [(None, "DEEPSPEED=<folder>"), ("empty", "has no tests/unit")])
def test_it_is_skipped_without_a_checkout(
    folder: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([] if folder is None else ["--deepspeed", str(tmp_path / folder)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("skipped: ") and words in told


@pytest.mark.parametrize(
    "outcomes, num_engines, status, words",
    [
        ({"a": "passed"}, 2, 0, "0 unexpected"),
        ({"a": "passed"}, 0, 1, "no engine had this block"),
        ({}, 0, 1, "zero/test_a.py: no tests"),
    ],
)
def test_a_run_that_compares_nothing_is_no_success(
    outcomes: dict[str, str],
    num_engines: int,
    status: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "tests" / "unit").mkdir(parents=True)
    (tmp_path / "tests" / "unit" / "common.py").touch()
    ended = outcomes, Counter({"active": num_engines, "without": 1})
    monkeypatch.setattr(run, "run_file", lambda _run, _file, _block: ended)
    assert run.main(["--deepspeed", str(tmp_path), "--file", "zero/test_a.py"]) == status
    assert words in capsys.readouterr().out


def test_only_what_is_not_refused_gets_the_block(tmp_path: Path) -> None:
    gaf = {"mixing": {"type": "GAF"}}
    plain = {"zero_optimization": {"stage": 2}}
    assert inject._with_block(plain, gaf) == {**plain, "gradmix": gaf} and "gradmix" not in plain
    (tmp_path / "ds_config.json").write_text('{"zero_optimization": {"stage": 1}}')
    told = inject._with_block(str(tmp_path / "ds_config.json"), gaf)
    assert told == {"zero_optimization": {"stage": 1}, "gradmix": gaf}
    stage_3 = {"zero_optimization": {"stage": 3}}
    assert inject._with_block(stage_3, gaf) == {**stage_3, "gradmix": gaf}
    with_hpz = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    for other in (with_hpz, "no such file", None):
        assert inject._with_block(other, gaf) == other
