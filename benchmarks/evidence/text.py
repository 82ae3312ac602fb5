"""Text of several kinds that any machine with this project's packages has, as token files.

    python    the sources of the standard library
    c++       the headers that come with PyTorch
    prose     what installed packages say of themselves, and their licences
    cipher    the same prose, every letter moved by 13 places: a language with words of its own

All have the tokenizer of the first three together, trained on equal shares of them. The text with which the
committed results were made is named in them by its digest; other versions of Python and PyTorch have another.
"""

from __future__ import annotations

import codecs
import fcntl
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from gradmix_pretrain.corpus import Piece, split, standard_library_pieces, walk
from prepare import train_tokenizer, write_tokens

from benchmarks.evidence import ROOT

KINDS = ("python", "c++", "prose", "cipher")
KIND_BYTES = 2_500_000
VALIDATION_FRACTION = 0.04
FOLDER = ROOT / "runs" / "evidence" / "text"


def folder(kind: str) -> Path:
    """Where the token files of a kind are."""
    return FOLDER / kind.replace("+", "p")


def prepare(kind: str, vocab_size: int) -> None:
    """Write the token files of all kinds, unless they are there; processes wait for each other."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder(kind) / "meta.json").exists():
            _prepare_all(vocab_size)


def _prepare_all(vocab_size: int) -> None:
    parts = {}
    for kind in KINDS:
        path = folder(kind) / "text"
        path.parent.mkdir(exist_ok=True)
        path.write_text(_text(kind))
        parts[kind] = split([Piece("text", path)], VALIDATION_FRACTION)
    sample = [Piece("text", folder(kind) / "text", end=0.5) for kind in KINDS if kind != "cipher"]
    model = train_tokenizer(sample, vocab_size)
    for kind, (train_pieces, validation_pieces) in parts.items():
        write_tokens(folder(kind), model, train_pieces, validation_pieces, kind)


def _text(kind: str) -> str:
    """Whole files, each text once, up to KIND_BYTES characters."""
    texts: dict[str, None] = {}
    length = 0
    for piece in _pieces(kind):
        text = piece.read()
        if text and text not in texts:
            texts[text] = None
            length += len(text)
        if length > KIND_BYTES:
            break
    joined = "".join(texts)
    return codecs.encode(joined, "rot13") if kind == "cipher" else joined


def _pieces(kind: str) -> Iterable[Piece]:
    if kind == "python":
        return standard_library_pieces(KIND_BYTES)
    packages = Path(sysconfig.get_path("purelib"))
    if kind == "c++":
        return walk(packages / "torch" / "include", suffix=".h")
    described = (piece for piece in walk(packages) if ".dist-info/" in piece.name)
    return (piece for piece in described if piece.path.stem.upper() in ("METADATA", "LICENSE", "COPYING"))
