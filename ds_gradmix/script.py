"""Running a user's script as if it had been started directly, with ds_gradmix switched on."""

from __future__ import annotations

import importlib.machinery
import os
import runpy
import sys
import types
from collections.abc import Sequence

LOCAL_RANK = ("--local_rank", "--local-rank")  # what launchers put before the script's name begins so


def run_script(arguments: Sequence[str]) -> None:
    """Run `[--local_rank=N] SCRIPT ...` or `[--local_rank=N] -m MODULE ...` as `__main__`.

    `deepspeed --module ds_gradmix` puts `--local_rank=N` before the script's name; started directly, the
    script would find it as its first argument, so that is where it goes. The script gets its own `sys.argv`,
    `sys.path[0]`, `__name__` and `__file__`; its exit status and exceptions are the process's.
    """
    ranks = [argument for argument in arguments[:1] if argument.startswith(LOCAL_RANK)]
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
