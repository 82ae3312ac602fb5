"""The text files of the corpus, and their split into training and validation."""

import argparse
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Folders inside the standard library's that hold installed packages, tests or compiled files.
NOT_SOURCES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Piece:
    """A text file, or the part of it between two fractions of its length."""

    name: str
    path: Path
    begin: float = 0.0
    end: float = 1.0

    def read(self) -> str | None:
        """The piece's text, or None if the file is not UTF-8."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return None
        return text[int(self.begin * len(text)) : int(self.end * len(text))]


def name_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, so it is equal on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def standard_library_pieces(max_bytes: int) -> list[Piece]:
    """The sources of the running Python's standard library, in hash order, up to `max_bytes`."""
    root = Path(sysconfig.get_path("stdlib"))
    pieces: list[Piece] = []
    total_bytes = 0
    for piece in sorted(walk(root, suffix=".py", skip=NOT_SOURCES), key=lambda piece: name_hash(piece.name)):
        total_bytes += piece.path.stat().st_size
        if total_bytes > max_bytes:
            break
        pieces.append(piece)
    return pieces


def corpus_pieces(paths: Sequence[Path]) -> list[Piece]:
    """The given files, and all files under the given folders except hidden ones."""
    pieces: list[Piece] = []
    for path in paths:
        if path.is_dir():
            pieces += walk(path)
        elif path.is_file():
            pieces.append(Piece(path.name, path))
        else:
            raise ValueError(f"--corpus: {path} is neither a file nor a folder")
    return sorted(pieces, key=lambda piece: (piece.name, str(piece.path)))


def walk(root: Path, suffix: str = "", skip: frozenset[str] | set[str] = frozenset()) -> Iterator[Piece]:
    """The files under a folder that end with `suffix`, except hidden ones and those in folders to skip."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in skip and not name.startswith("."))
        for file in sorted(files):
            path = Path(folder, file)
            if file.endswith(suffix) and not file.startswith(".") and path.is_file():
                yield Piece(path.relative_to(root).as_posix(), path)


def split(pieces: Sequence[Piece], validation_fraction: float) -> tuple[list[Piece], list[Piece]]:
    """Training and validation pieces, both in hash order.

    A file is held out for validation if the hash of its name is below the fraction, so adding files does not
    move another from one side to the other. Both sides get at least one file; a single file is cut in two,
    and its end is held out.
    """
    if not pieces:
        raise ValueError("the corpus holds no files")
    if len(pieces) == 1:
        (file,) = pieces
        cut = 1.0 - validation_fraction
        return [Piece(file.name, file.path, end=cut)], [Piece(file.name, file.path, begin=cut)]
    ordered = sorted(pieces, key=lambda piece: (name_hash(piece.name), str(piece.path)))
    num_held_out = sum(name_hash(piece.name) < validation_fraction for piece in ordered)
    num_held_out = min(max(num_held_out, 1), len(ordered) - 1)
    return ordered[num_held_out:], ordered[:num_held_out]


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the text files."""
    parser.add_argument(
        "--corpus",
        type=Path,
        nargs="+",
        help="text files or folders (default: this Python's own standard-library sources)",
    )
    parser.add_argument("--max-mb", type=float, default=16, help="cap on the default corpus (default: 16)")


def chosen_pieces(args: argparse.Namespace) -> list[Piece]:
    """The files that the options of `add_corpus_arguments` select."""
    return corpus_pieces(args.corpus) if args.corpus else standard_library_pieces(int(args.max_mb * 1e6))
