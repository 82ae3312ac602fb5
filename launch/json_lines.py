"""Turns text files into one of JSON lines, `{"text": ...}` each, for the preprocessing of other projects."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from corpus import corpus_pieces, standard_library_pieces


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument(
        "--corpus",
        type=Path,
        nargs="+",
        help="text files or folders (default: this Python's own standard-library sources)",
    )
    parser.add_argument("--max-mb", type=float, default=16, help="cap on the default corpus (default: 16)")
    args = parser.parse_args(argv)
    try:
        pieces = (
            corpus_pieces(args.corpus) if args.corpus else standard_library_pieces(int(args.max_mb * 1e6))
        )
        args.out.parent.mkdir(parents=True, exist_ok=True)
        num_texts = 0
        with args.out.open("w") as file:
            for piece in pieces:
                if text := piece.read():
                    file.write(json.dumps({"text": text}) + "\n")
                    num_texts += 1
    except (ValueError, OSError) as error:
        sys.exit(f"json_lines.py: error: {error}")
    print(f"{args.out}: {num_texts} texts")


if __name__ == "__main__":
    main()
