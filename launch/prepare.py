"""Turns text files into token files: `python launch/prepare.py --out FOLDER [--corpus PATH ...]`.

The folder then holds `tokenizer.model` (SentencePiece BPE, trained on the training split alone), `train.bin`
and `validation.bin` (arrays of token ids, to be memory-mapped) and `meta.json`. A second call with the same
corpus does nothing. `meta.json` is removed first and written last, so a folder that has one is complete.
"""

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from gradmix_pretrain.corpus import Piece, add_corpus_arguments, chosen_pieces, split

FORMAT = 1  # a folder in another format is prepared again
CHUNK_CHARS = 1 << 17  # for one call of the encoder; cut after a line, since no token contains a line break
TOKENIZER_CHARS = 4_000_000  # that the tokenizer is trained on; more changes little and takes longer


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Turn text files into token files for launch/pretrain.py.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the token files")
    add_corpus_arguments(parser)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--validation-fraction", type=float, default=0.04, help="share of files held out")
    args = parser.parse_args(argv)
    if not 0 < args.validation_fraction < 1:
        parser.error(f"--validation-fraction {args.validation_fraction} is not between 0 and 1")
    if args.vocab_size < 260:
        parser.error(f"--vocab-size {args.vocab_size} is too small: the 256 bytes and 4 symbols need 260")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare the folder, or exit with a message."""
    args = parse_args(argv)
    try:
        prepare(args)
    except (ValueError, OSError) as error:
        sys.exit(f"prepare.py: error: {error}")


def prepare(args: argparse.Namespace) -> None:
    """Train a tokenizer and encode the corpus, unless the folder holds the result already."""
    pieces = chosen_pieces(args)
    train_pieces, validation_pieces = split(pieces, args.validation_fraction)
    source = source_signature([*train_pieces, *validation_pieces], args.vocab_size, len(train_pieces))
    meta_path = args.out / "meta.json"
    if meta_path.exists() and json.loads(meta_path.read_text())["source"] == source:
        print(f"{args.out}: already prepared")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    meta_path.unlink(missing_ok=True)

    print(f"{args.out}: {len(train_pieces)} training and {len(validation_pieces)} validation files")
    model = train_tokenizer(train_pieces, args.vocab_size)
    meta = write_tokens(args.out, model, train_pieces, validation_pieces, source)
    print(f"{args.out}: {meta['train_tokens']} training and {meta['validation_tokens']} validation tokens")


def write_tokens(
    out: Path,
    model: bytes,
    train_pieces: Sequence[Piece],
    validation_pieces: Sequence[Piece],
    source: str,
) -> dict[str, str | int]:
    """Encode both parts by a tokenizer into a folder, and complete it; returns what meta.json has."""
    write_bytes(out / "tokenizer.model", [model])
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size() <= 1 << 16 else np.uint32)
    meta: dict[str, str | int] = {"source": source, "vocab_size": tokenizer.vocab_size(), "dtype": dtype.name}
    for name, part in (("train", train_pieces), ("validation", validation_pieces)):
        num_bytes, digest = write_bytes(out / f"{name}.bin", encoded(tokenizer, part, dtype))
        if num_bytes == 0:
            raise ValueError(f"no {name} text: is the corpus UTF-8?")
        meta |= {f"{name}_tokens": num_bytes // dtype.itemsize, f"{name}_sha256": digest}
    write_bytes(out / "meta.json", [json.dumps(meta, indent=2).encode()])
    return meta


def source_signature(pieces: Sequence[Piece], vocab_size: int, num_train: int) -> str:
    """A digest of the names, sizes and times of the files, which changes when a file does."""
    digest = hashlib.sha256(f"{FORMAT} {vocab_size} {num_train}".encode())
    for piece in pieces:
        status = piece.path.stat()
        digest.update(
            f"{piece.name} {piece.begin} {piece.end} {status.st_size} {status.st_mtime_ns}\n".encode()
        )
    return digest.hexdigest()


def train_tokenizer(pieces: Sequence[Piece], vocab_size: int) -> bytes:
    """A BPE model that decodes every text exactly: no normalisation, and bytes for rare characters."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=tokenizer_lines(pieces),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation
            user_defined_symbols=["\n"],
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"no tokenizer of {vocab_size} pieces from this corpus: {reason}") from error
    return model.getvalue()


def tokenizer_lines(pieces: Sequence[Piece]) -> Iterator[str]:
    """The lines that the tokenizer is trained on."""
    num_chars = 0
    for piece in pieces:
        for line in (piece.read() or "").splitlines():
            num_chars += len(line)
            yield line
        if num_chars > TOKENIZER_CHARS:
            return


def encoded(
    tokenizer: sentencepiece.SentencePieceProcessor, pieces: Sequence[Piece], dtype: np.dtype
) -> Iterator[bytes]:
    """The token ids of each piece and an end-of-text id; files that are not UTF-8 are skipped and counted."""
    num_skipped = 0
    for piece in pieces:
        text = piece.read()
        if text is None:
            num_skipped += 1
            continue
        for ids in tokenizer.encode(list(chunks(text))):
            yield np.asarray(ids, dtype=dtype).tobytes()
        if text:
            yield np.asarray([tokenizer.eos_id()], dtype=dtype).tobytes()
    if num_skipped:
        print(f"skipped {num_skipped} files that are not UTF-8")


def chunks(text: str) -> Iterator[str]:
    """The text in parts that end with a line."""
    begin = 0
    while begin < len(text):
        newline = text.find("\n", begin + CHUNK_CHARS)
        end = len(text) if newline < 0 else newline + 1
        yield text[begin:end]
        begin = end


def write_bytes(path: Path, blocks: Iterable[bytes]) -> tuple[int, str]:
    """Write to a temporary name and rename, so that `path` is never incomplete; returns size and SHA-256."""
    partial = path.with_name(path.name + ".partial")
    num_bytes = 0
    digest = hashlib.sha256()
    with partial.open("wb") as file:
        for block in blocks:
            num_bytes += file.write(block)
            digest.update(block)
    os.replace(partial, path)
    return num_bytes, digest.hexdigest()


if __name__ == "__main__":
    main()
