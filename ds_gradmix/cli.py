"""`ds_gradmix VERB ...`: the commands for people, each of which is a module."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

from ds_gradmix.commands import check, env, init
from ds_gradmix.report import command as report


class Command(Protocol):
    """A module that is a verb."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Define what may stand after the verb."""

    def run(self, options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
        """Do it, and return the exit status, 2 for a mistake."""


_COMMANDS: Mapping[str, Command] = {"init": init, "check": check, "env": env, "report": report}
VERBS = tuple(_COMMANDS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; the exit status, 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="ds_gradmix", description="Gradient mixing inside DeepSpeed ZeRO.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{" + ",".join(VERBS) + "}")
    parsers = {name: verbs.add_parser(name, help=command.HELP) for name, command in _COMMANDS.items()}
    for name, command in _COMMANDS.items():
        command.add_arguments(parsers[name])
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files may be no text, and a terminal no UTF-8
            stream.reconfigure(errors="backslashreplace")
    return _COMMANDS[options.verb].run(options, parsers[options.verb])
