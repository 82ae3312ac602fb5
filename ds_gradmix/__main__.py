"""`python -m ds_gradmix SCRIPT ...`: any DeepSpeed script, unedited, honours its config's gradmix block."""

import importlib.machinery
import os
import runpy
import sys
import types
from collections.abc import Sequence
from typing import Any

from ds_gradmix.cli import VERBS
from ds_gradmix.cli import main as verbs

_LOCAL_RANK = ("--local_rank", "--local-rank")  # what launchers put before the script's name begins so
_USAGE = """usage: python -m ds_gradmix SCRIPT [its options]       (also: -m MODULE)
       deepspeed [launcher options] --module ds_gradmix SCRIPT [its options]
       ds_gradmix {verbs} ...
"""


def main(arguments: list[str]) -> None:
    """Start a script; a verb in its place is passed on to the command line."""
    plain = [argument for argument in arguments if not argument.startswith(_LOCAL_RANK)]
    if not plain or plain[0] in ("-h", "--help"):
        sys.stderr.write(_USAGE.format(verbs="|".join(VERBS)))
        sys.exit(0 if plain else 2)
    if plain[0] in VERBS and not os.path.exists(plain[0]):
        sys.exit(verbs(plain))
    if plain[0] != "-m" and not os.path.isfile(plain[0]):
        sys.stderr.write(f"ds_gradmix: error: can't open script {plain[0]!r}: no such file\n")
        sys.exit(2)
    from ds_gradmix import enable
    from ds_gradmix.slurm import rank_environment

    os.environ.update(rank_environment(os.environ))
    sys.excepthook = _without_traceback(sys.excepthook)
    enable()
    run_script(arguments)


def _without_traceback(original: Any) -> Any:
    """An exception hook that prints our own errors alone: they are about configurations, not about code."""
    import torch.distributed as dist

    from ds_gradmix.comm.consistency import MismatchError
    from ds_gradmix.config import ConfigError
    from ds_gradmix.engines.deepspeed_api import DeepSpeedApiError

    def excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, (ConfigError, DeepSpeedApiError, MismatchError)):
            original(kind, error, trace)
            return
        sys.stderr.write("".join(f"ds_gradmix: error: {line}\n" for line in str(error).splitlines()))
        sys.stderr.flush()
        if issubclass(kind, ConfigError) and dist.is_initialized():
            dist.destroy_process_group()  # or its threads may abort the interpreter, whose status is 1

    return excepthook


def run_script(arguments: Sequence[str]) -> None:
    """Run `[--local_rank=N] SCRIPT ...` or `[--local_rank=N] -m MODULE ...` as `__main__`.

    `deepspeed --module ds_gradmix` puts `--local_rank=N` before the script's name; started directly, the
    script would find it as its first argument, so that is where it goes. The script gets its own `sys.argv`,
    `sys.path[0]`, `__name__` and `__file__`; its exit status and exceptions are the process's.
    """
    ranks = [argument for argument in arguments[:1] if argument.startswith(_LOCAL_RANK)]
    rest = list(arguments[len(ranks) :])
    if rest[:1] == ["-m"] and len(rest) > 1:
        sys.argv = [rest[1], *ranks, *rest[2:]]
        sys.path[0] = os.getcwd()
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        return
    path = rest[0]
    sys.argv = [path, *ranks, *rest[1:]]
    if not getattr(sys.flags, "safe_path", False):  # Python 3.11
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    full_path = os.path.abspath(path)  # as Python itself gives a script its __file__
    with open(path, "rb") as file:
        code = compile(file.read(), full_path, "exec", dont_inherit=True)  # not our __future__
    # Not runpy.run_path, which takes the module away when the script ends: threads and exit handlers need it.
    main = types.ModuleType("__main__")
    main.__file__ = full_path
    main.__loader__ = importlib.machinery.SourceFileLoader("__main__", full_path)
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


if __name__ == "__main__":
    main(sys.argv[1:])
