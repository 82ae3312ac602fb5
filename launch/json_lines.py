"""Writes text files as JSON lines, `{"text": ...}` for each file, as Megatron's preprocessing reads them."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gradmix_pretrain.corpus import add_corpus_arguments, chosen_pieces


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file that `--out` names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    add_corpus_arguments(parser)
    args = parser.parse_args(argv)
    try:
        pieces = chosen_pieces(args)
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
