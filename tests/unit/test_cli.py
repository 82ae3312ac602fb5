"""The commands for people: what they print, files that are none, and what `init` leaves as it is."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import hjson
import pytest

from ds_gradmix.cli import main
from ds_gradmix.commands.layout import WIDTH
from ds_gradmix.config import parse_block
from ds_gradmix.rules import EXTRAPOLATION, MIXING, SCALING

PLAIN = '{\n    "zero_optimization": {"stage": 2},\n    "bf16": {"enabled": true}\n}\n'
GAF = {"mixing": {"type": "GAF", "params": {"threshold": 0.97}}}
GAF_OPTION = ["--mixing", "gaf:threshold=0.97"]
NEXT = "next: deepspeed --module ds_gradmix train.py --deepspeed_config"


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "c.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


@pytest.mark.parametrize(
    "rules", [*itertools.product((*MIXING, None), (*SCALING, None), (*EXTRAPOLATION, None))]
)
def test_check_prints_for_people_and_for_programs(
    rules: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slots = zip(("mixing", "scaling", "extrapolation"), rules, strict=True)
    examples = {slot: rule.examples()[0] for slot, rule in slots if rule is not None}
    block = {slot: {"type": rule.type_name(), "params": rule.model_dump()} for slot, rule in examples.items()}
    config = {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 2, "gradmix": block}
    path = written(tmp_path, json.dumps(config))
    options = [path, "--dp", "4", "4096", "--params", "70e9"]
    assert main(["check", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[1:-1])) <= WIDTH  # the last has the path, which is never broken
    assert lines[-1].split()[-1] == path
    for slot in ("mixing", "scaling", "extrapolation"):
        name = examples[slot].type_name() if slot in examples else {"mixing": "Mean"}.get(slot, "none")
        assert any(line.split()[:2] in ([slot, name], [slot, f"{name}:"]) for line in lines), slot
    assert main(["check", *options, "--json"]) == 0
    data = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert parse_block(data["gradmix"]) == parse_block(block)
    for step, row in zip(data["costs"]["steps"], data["costs"]["sent_relative_to_stock"], strict=True):
        assert step["cluster"]["ranks"] == row["ranks"]
        assert f"{step['block']['sent'] / 1e9:.4g}" in "\n".join(lines)
        assert f"{row['even_buckets']:.3f}" in "\n".join(lines)


def test_check_says_what_to_type_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "a config" + "x" * 60
    for file, ends in ((Path("c.json"), [f"{NEXT} c.json"]), (Path(name), None)):
        file.write_text(json.dumps({"gradmix": {}}))
        assert main(["check", str(file)]) == 0
        last = capsys.readouterr().out.splitlines()[-2:]
        assert last[1:] == ends or last == [f"{NEXT[:-19]} \\", f"      --deepspeed_config '{name}'"]


@pytest.mark.parametrize(
    "config, options, warning",
    [
        (
            {"scaling": {"type": "VRGD"}},
            ["--dp", "4", "8"],
            "VRGD wants at least 8 workers, and 4 ranks are 4",
        ),
        ({"scaling": {"type": "VRGD"}, "worker": 2}, ["--dp", "8"], "8 workers, and 8 ranks are 4"),
        ({"scaling": {"type": "VRGD"}}, [], "VRGD wants at least 8 workers; --dp"),
        ({"scaling": {"type": "VRGD"}}, ["--dp", "8"], None),
        (GAF, ["--dp", "1"], "with 1 ranks there is one worker"),
        (GAF, [], None),
    ],
)
def test_check_warns(
    config: Any, options: list[str], warning: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, json.dumps({"gradmix": config}))
    assert main(["check", path, *options]) == 0
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(found) == (warning is not None) and (warning or "") in "".join(found)


def test_check_of_a_config_that_a_trainer_fills_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each "auto" counts as absent, and is named."""
    auto = {"bf16": {"enabled": "auto"}, "gradient_accumulation_steps": "auto"}
    zero = {"stage": 2, "reduce_bucket_size": "auto"}
    texts = []
    path = written(tmp_path, json.dumps({"gradmix": GAF, **auto}))
    assert main(["check", path]) == 0
    shown = " ".join(capsys.readouterr().out.replace("\\\n", "").split())
    assert shown.endswith(f"next: deepspeed --module ds_gradmix train.py --deepspeed {path}")
    for config in ({**auto, "zero_optimization": zero}, {"zero_optimization": {"stage": 2}}):
        assert main(["check", written(tmp_path, json.dumps({"gradmix": GAF, **config})), "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0]["costs"] == texts[1]["costs"] and not texts[1]["warnings"]
    names = "bf16.enabled, gradient_accumulation_steps, zero_optimization.reduce_bucket_size"
    assert texts[0]["warnings"][0].endswith(f": {names}")


HOSTILE = {
    "many digits": ('{"a": ' + "9" * 5000 + "}", "is not JSON: Exceeds the limit (4300 digits)"),
    "1e400": ('{"a": 1e400, "gradmix": {}}', "a number beyond the largest"),
    "NaN": ('{"gradmix": {"mixing": {"type": NaN}}\n}', "is not JSON"),
    "NaN as a word": ('{"gradmix": {"mixing": NaN\n}}', "gradmix.mixing: is"),
    "nested objects": ('{"a":' * 3000 + "1" + "}" * 3000, "is nested too deeply"),
    "nested lists": ('{"gradmix":' + "[" * 3000 + "]" * 3000 + "}", "is nested too deeply"),
    "lone surrogates": ('{"gradmix": {"mixing": {"type": "\\ud800"}}}', '"\\ud800"'),
    "binary": (bytes(range(256)), "is not text"),
    "control characters": ("\x00\x01\x1b[2J{", "is not"),
    "a comment without an end": ("{/*", "is not JSON"),
    "empty": ("", "is empty"),
    "size of a bucket": (
        '{"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}, "gradmix": {}}',
        ">= 1",
    ),
    "steps": ('{"gradient_accumulation_steps": ' + "9" * 400 + ', "gradmix": {}}', "< 2^63"),
    "seed": ('{"gradmix": {"seed": ' + "9" * 400 + "}}", "gradmix.seed: is 9"),
    "list": ("[1]", "is not a JSON object"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_are_no_config(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, words = HOSTILE[name]
    path = written(tmp_path, text)
    before = Path(path).read_bytes()
    runs = [["check", path], ["check", path, "--json"]]
    if b"gradmix" not in before:
        runs.append(["init", path])
    for run in runs:
        assert main(run) == 2
        out, error = capsys.readouterr()
        assert not out and error.count("\n") == 1 and words in error, error
        assert error.startswith(f"{path}: ") and error.rstrip("\n").isprintable()
    assert Path(path).read_bytes() == before and os.listdir(tmp_path) == ["c.json"]


def test_init_reads_no_more_of_hostile_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --force a block is replaced, whatever it was; what else is in the file still has to be read."""
    for name in ("lone surrogates", "seed", "NaN as a word"):
        path = written(tmp_path, HOSTILE[name][0])
        assert main(["init", path, "--force"]) == 0, name
        assert hjson.loads(Path(path).read_text()) == {"gradmix": {"mixing": {"type": "GAF"}}}
    for name in ("1e400", "NaN", "nested lists"):
        assert main(["init", written(tmp_path, HOSTILE[name][0]), "--force"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_paths_that_are_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing, long = str(tmp_path / "none.json"), str(tmp_path / ("x" * 300))
    good = written(tmp_path, PLAIN)
    cases = [[verb, path] for verb in ("check", "init") for path in (str(tmp_path), missing, long)]
    cases += [["init", good, "--force", "-o", path] for path in (str(tmp_path), missing + "/x", long)]
    for case in cases:
        assert main(case) == 2, case
        assert capsys.readouterr().err.count("\n") == 1
    assert os.listdir(tmp_path) == ["c.json"]


@pytest.mark.parametrize(
    "before, after",
    [
        (PLAIN, PLAIN.replace('true}\n', 'true},\n    "gradmix": BLOCK\n')),
        (PLAIN.replace("\n", "\r\n"), PLAIN.replace('true}\n', 'true},\n    "gradmix": BLOCK\n')),
        ('{"a": [1, {}]}', '{"a": [1, {}], "gradmix": BLOCK}'),
        ("{}", '{"gradmix": BLOCK}'),
        ("{\n}", '{\n  "gradmix": BLOCK\n}'),
        ("\ufeff{\n\t\"a\": 1\n}", '\ufeff{\n\t"a": 1,\n\t"gradmix": BLOCK\n}'),
        ('{ // "x": {\n  "a": "}//", # }\n}', '{ // "x": {\n  "a": "}//", # }\n  "gradmix": BLOCK\n}'),
        ('{\n  "a": 1 /* , */\n}\n', '{\n  "a": 1, /* , */\n  "gradmix": BLOCK\n}\n'),
        ("{\n  a: some words\n  b: 1\n}", '{\n  a: some words\n  b: 1,\n  "gradmix": BLOCK\n}'),
        ("{\n  a: some words\n}", '{\n  a: some words\n  "gradmix": BLOCK\n}'),
        ("# all\na: x y\n", '# all\na: x y\n"gradmix": BLOCK\n'),
        ('{"b": 1e5, "a": 100000000000000001}', '{"b": 1e5, "a": 100000000000000001, "gradmix": BLOCK}'),
        ('{\n "gradmix": {"seed": 1}, // s\n "b": [{}]\n}', '{\n "gradmix": BLOCK, // s\n "b": [{}]\n}'),
        ('{"gradmix": null, "a": 1}', '{"gradmix": BLOCK, "a": 1}'),
    ],
)  # fmt: skip
def test_init_leaves_every_other_byte(
    before: str, after: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(written(tmp_path, before))
    path.chmod(0o640)
    force = ["--force"] if "gradmix" in before else []
    if force:
        assert main(["init", str(path), *GAF_OPTION]) == 2
        assert path.read_bytes() == before.encode() and "--force" in capsys.readouterr().err
    assert main(["init", str(path), *GAF_OPTION, *force]) == 0, capsys.readouterr().err
    text = path.read_bytes().decode()
    head, tail = after.replace("\n", "\r\n").split("BLOCK") if "\r" in before else after.split("BLOCK")
    assert text.startswith(head) and text.endswith(tail), text
    assert json.loads(text[len(head) : len(text) - len(tail)]) == GAF
    assert hjson.loads(text)["gradmix"] == GAF and ("\r" in before) == ("\r\n" in text)
    assert path.stat().st_mode & 0o777 == 0o640 and os.listdir(tmp_path) == ["c.json"]
    shown = capsys.readouterr().out.splitlines()
    assert "written" in shown[0] and shown[-1].split()[-1] == str(path)


def test_a_block_is_indented_like_its_file(tmp_path: Path) -> None:
    path = written(tmp_path, PLAIN)
    assert main(["init", path, *GAF_OPTION]) == 0
    config = {**json.loads(PLAIN), "gradmix": GAF}
    assert Path(path).read_text().splitlines()[3:] == json.dumps(config, indent=4).splitlines()[7:]


def test_hjson_that_cannot_be_spliced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With braces in a string that the scan cannot know; nothing is lost without being asked for."""
    text = "{\n  a: words } and {{\n  # s\n  gradmix: {seed: 1}\n}"
    path = written(tmp_path, text)
    assert main(["init", path, "--force"]) == 2
    assert "-o OUT" in capsys.readouterr().err and Path(path).read_text() == text
    out = tmp_path / "out.json"
    assert main(["init", path, "--force", "-o", str(out)]) == 0
    expected = {**hjson.loads(text), "gradmix": {"mixing": {"type": "GAF"}}}
    assert json.loads(out.read_text()) == expected
    assert "comments" in capsys.readouterr().out
    assert main(["init", written(tmp_path, PLAIN), "-o", str(out)]) == 2
    assert f"{out} is there already; --force" in capsys.readouterr().err


def test_init_makes_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--scaling", "vrgd:gamma=0.2,momentum=0.9", "--extrapolation", "PastGradient:lr_ratio=1"]
    assert main(["init", *options]) == 0
    config = json.loads(Path("ds_config.json").read_text())
    assert config["gradmix"] == {
        "scaling": {"type": "VRGD", "params": {"gamma": 0.2, "momentum": 0.9}},
        "extrapolation": {"type": "PastGradient", "params": {"lr_ratio": 1}},
    }
    assert capsys.readouterr().out.splitlines()[-1] == "next: ds_gradmix check ds_config.json"
    assert main(["check", "ds_config.json"]) == 0


@pytest.mark.parametrize(
    "options, words",
    [
        (["--mixing", "GAFF"], 'gradmix.mixing.type: is "GAFF"'),
        (["--mixing", "GAF:threshold=3"], "gradmix.mixing.params.threshold: is 3"),
        (["--mixing", "GAF:threshold=NaN"], 'threshold: is "NaN"'),
        (["--mixing", "GAF:threshold=" + "9" * 5000], "threshold: is "),
        (["--extrapolation", "Noise:std=1e400"], "std: is inf"),
        (["--scaling", "VRGD:gamma"], 'gradmix.scaling.type: is "VRGD:gamma"'),
        (["--scaling", "VRGD:gamma=1,x"], "allowed: RULE:key=value"),
        (["--scaling", "VRGD:gamma=1,gamma=1"], '"gamma" twice'),
        (["--mixing", "os:system"], '"os:system"'),
        (["--mixing", "\udcff:x=1"], "\\udcff"),
    ],
)
def test_init_validates(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, PLAIN)
    assert main(["init", path, *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error
    assert Path(path).read_text() == PLAIN and os.listdir(tmp_path) == ["c.json"]


def test_init_refuses_what_training_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, '{"zero_optimization": {"stage": 3, "mics_shard_size": 2}}')
    assert main(["init", path]) == 2
    assert "zero_optimization.mics_shard_size: 2" in capsys.readouterr().err


def test_a_rule_of_ones_own_has_a_colon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rules_of_cli.py").write_text("from ds_gradmix.rules import GAF\nclass Own(GAF):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = written(tmp_path, PLAIN)
    assert main(["init", path, "--mixing", "rules_of_cli:Own:threshold=0.5"]) == 0
    rule = json.loads(Path(path).read_text())["gradmix"]["mixing"]
    assert rule == {"type": "rules_of_cli:Own", "params": {"threshold": 0.5}}


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text(PLAIN)
    (tmp_path / "link.json").symlink_to("real.json")
    assert main(["init", str(tmp_path / "link.json")]) == 0
    assert (tmp_path / "link.json").is_symlink() and "gradmix" in (tmp_path / "real.json").read_text()


def test_env(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from ds_gradmix.commands import env

    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["ds_gradmix"] and found["versions"]["deepspeed"] in found["tested_deepspeed"]
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH and lines[-1] == "next: ds_gradmix check ds_config.json"
    stock = env._version
    monkeypatch.setattr(
        env, "_version", lambda name: {"deepspeed": "0.1", "trl": None}.get(name, stock(name))
    )
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"next: pip install deepspeed=={found['tested_deepspeed'][-1]}"
    assert any(line.split()[:3] == ["trl", "not", "installed"] for line in lines)
