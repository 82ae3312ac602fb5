"""launch/prepare.py: the split, the tokenizer and the token files."""

import json
from collections.abc import Iterator
from pathlib import Path

import json_lines
import numpy as np
import prepare
import pytest
import sentencepiece
from gradmix_pretrain import corpus

WORDS = ["def", "return", "class", "import", "self", "value", "for", "not", "in", "the", "of", "gradient"]


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    """Forty small files under tmp_path/text: name to content."""
    generator = np.random.default_rng(0)
    made = {}
    for number in range(40):
        lines = [
            " " * 4 * int(generator.integers(3)) + " ".join(generator.choice(WORDS, 6)) for _ in range(30)
        ]
        made[f"part{number % 4}/file{number}.txt"] = "\n".join(lines) + "\n\n\tend\n"
    for name, text in made.items():
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return made


def run(tmp_path: Path, out: str = "data", vocab_size: int = 320, corpus: str = "text") -> Path:
    folder = tmp_path / out
    options = ["--vocab-size", str(vocab_size), "--validation-fraction", "0.2"]
    prepare.main(["--out", str(folder), "--corpus", str(tmp_path / corpus), *options])
    return folder


def documents(folder: Path, name: str) -> list[str]:
    """The texts that a token file decodes to."""
    meta = json.loads((folder / "meta.json").read_text())
    ids_N = np.fromfile(folder / f"{name}.bin", dtype=meta["dtype"])
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert ids_N[-1] == tokenizer.eos_id()
    parts = np.split(ids_N, np.flatnonzero(ids_N == tokenizer.eos_id()) + 1)[:-1]
    return [tokenizer.decode(part[:-1].tolist()) for part in parts]


def test_tokens_decode_to_the_files_and_the_split_is_disjoint(tmp_path: Path, texts: dict[str, str]) -> None:
    folder = run(tmp_path)
    training, validation = documents(folder, "train"), documents(folder, "validation")
    assert sorted(training + validation) == sorted(texts.values())
    assert not set(training) & set(validation)
    assert 2 <= len(validation) <= 16


def test_files_stay_on_their_side_when_others_are_added(tmp_path: Path, texts: dict[str, str]) -> None:
    pieces = corpus.corpus_pieces([tmp_path / "text"])
    _, few = corpus.split(pieces[::2], 0.2)
    _, all_of_them = corpus.split(pieces, 0.2)
    assert {piece.name for piece in few} == {piece.name for piece in all_of_them} & {
        piece.name for piece in pieces[::2]
    }


def test_same_corpus_same_bytes(tmp_path: Path, texts: dict[str, str]) -> None:
    first, second = run(tmp_path, "first"), run(tmp_path, "second")
    for name in ("tokenizer.model", "train.bin", "validation.bin", "meta.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_prepared_once_and_again_only_when_a_file_changed(tmp_path: Path, texts: dict[str, str]) -> None:
    folder = run(tmp_path)
    written = (folder / "train.bin").stat().st_mtime_ns
    assert (run(tmp_path) / "train.bin").stat().st_mtime_ns == written
    _, held_out = corpus.split(corpus.corpus_pieces([tmp_path / "text"]), 0.2)
    held_out[0].path.write_text("something else\n")
    assert "something else\n" in documents(run(tmp_path), "validation")


def test_an_interrupted_preparation_is_done_over(
    tmp_path: Path, texts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path, "whole")

    def interrupted(*_: object) -> Iterator[bytes]:
        yield b"12"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "encoded", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert not (tmp_path / "data" / "meta.json").exists()
    assert (run(tmp_path) / "train.bin").read_bytes() == (whole / "train.bin").read_bytes()


def test_tokenizer_knows_nothing_of_the_held_out_files(tmp_path: Path, texts: dict[str, str]) -> None:
    _, held_out = corpus.split(corpus.corpus_pieces([tmp_path / "text"]), 0.2)
    for piece in held_out:
        piece.path.write_text("zyxzyx qqq\n" * 500)
    folder = run(tmp_path)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size())]
    assert not any("z" in piece or "q" in piece for piece in pieces)
    assert documents(folder, "validation")[0] == "zyxzyx qqq\n" * 500  # by single bytes


def test_files_that_are_not_utf8_are_skipped(
    tmp_path: Path, texts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    pieces, _ = corpus.split(corpus.corpus_pieces([tmp_path / "text"]), 0.2)
    pieces[0].path.write_bytes(b"\xff\xfe\x00latin")
    folder = run(tmp_path)
    assert len(documents(folder, "train") + documents(folder, "validation")) == len(texts) - 1
    assert "skipped 1 file" in capsys.readouterr().out


def test_one_file_is_cut_in_two(tmp_path: Path, texts: dict[str, str]) -> None:
    text = "".join(texts.values())
    (tmp_path / "one.txt").write_text(text)
    folder = run(tmp_path, corpus="one.txt")
    (training,), (validation,) = documents(folder, "train"), documents(folder, "validation")
    assert training + validation == text
    assert len(validation) == pytest.approx(0.2 * len(text), abs=1)


def test_long_files_are_encoded_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "CHUNK_CHARS", 5)
    text = "ab\ncdefghij\n\n\nk\nlmn\n\nopqrstuvw\nxyz"
    chunks = list(prepare.chunks(text))
    assert "".join(chunks) == text
    assert len(chunks) > 2
    assert all(chunk.endswith("\n") for chunk in chunks[:-1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vocab_size": 100_000}, "no tokenizer of 100000 pieces"),
        ({"corpus": "nowhere"}, "neither a file nor a folder"),
        ({"corpus": "empty"}, "holds no files"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, texts: dict[str, str], options: dict[str, str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, **options)
    message = str(stopped.value.code)
    assert said in message
    assert "\n" not in message


def test_standard_library_is_the_default_and_capped() -> None:
    pieces = corpus.standard_library_pieces(max_bytes=1_000_000)
    total = sum(piece.path.stat().st_size for piece in pieces)
    assert 500_000 < total <= 1_000_000
    assert all(piece.path.suffix == ".py" for piece in pieces)
    assert not any("site-packages" in piece.name or "test" in piece.name.split("/") for piece in pieces)


def test_json_lines_are_the_texts(
    tmp_path: Path, texts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text" / "binary").write_bytes(b"\xff\xfe")
    target = tmp_path / "new" / "corpus.jsonl"
    json_lines.main(["--out", str(target), "--corpus", str(tmp_path / "text")])
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert found == [{"text": texts[name]} for name in sorted(texts)]
    assert "40 texts" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="neither a file nor a folder"):
        json_lines.main(["--out", str(target), "--corpus", str(tmp_path / "missing")])
