"""Starting W ranks of a function on this machine, and getting back what each returns.

A fork server imports torch and DeepSpeed once, so that a rank starts in a fraction of a second.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

_NOT_CONNECTED = "the ranks are not connected"
_CONSEQUENCES = ("Connection", "without a word")  # of what became of another rank
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch",
        "deepspeed",
        "ds_gradmix.engines.install",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # the first engine imports it, and it torch's compiler
        "deepspeed.module_inject.auto_ep_layer",  # so it does this
        "transformers.models.llama.modeling_llama",  # and launch/pretrain.py these
        "matplotlib.pyplot",
        "bokeh.resources",
    ]
)


class RankError(Exception):
    """A rank failed; the message is its traceback."""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
    """`function(*args)` on W ranks of a gloo group; results in order of rank.

    Raises:
        RankError: if any rank raised.
        TimeoutError: if they are not done in time; they are killed.
    """
    try:
        return _run_ranks(world, function, args, timeout)
    except RankError as error:
        if _NOT_CONNECTED not in str(error):
            raise
    return _run_ranks(world, function, args, timeout)  # nothing has run: gloo's ranks did not find each other


def failures(checks: Mapping[str, Callable[[], None]]) -> dict[str, str | None]:
    """On a rank: make several checks, whatever becomes of the others; the traceback of each that failed."""
    failed: dict[str, str | None] = {}
    for name, check in checks.items():
        try:
            check()
            failed[name] = None
        except Exception:
            failed[name] = traceback.format_exc()
    return failed


def _run_ranks(world: int, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
    port = free_port()
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(world)]
    processes = [
        _CONTEXT.Process(target=_rank, args=(rank, world, port, sender, function, args), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    deadline = time.monotonic() + timeout
    try:
        results = [_receive(receiver, deadline) for receiver, _ in pipes]
    finally:
        for process in processes:
            process.join(0 if time.monotonic() > deadline else 10)
            if process.is_alive():
                process.kill()
    failures = [text for failed, text in results if failed]
    if failures:  # the cause, rather than what its loss did to the others
        failures.sort(
            key=lambda text: (any(words in text for words in _CONSEQUENCES), _NOT_CONNECTED not in text)
        )
        raise RankError(failures[0])
    return [value for _, value in results]


def _receive(receiver: Connection, deadline: float) -> tuple[bool, Any]:
    if not receiver.poll(max(deadline - time.monotonic(), 0)):
        raise TimeoutError("a rank did not finish in time")
    try:
        return pickle.loads(receiver.recv_bytes())  # type: ignore[no-any-return]
    except EOFError:
        return True, "a rank died without a word"


def _rank(
    rank: int, world: int, port: int, sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        GLOO_SOCKET_IFNAME="lo",
    )
    import deepspeed
    import torch

    gc.freeze()  # what all ranks share: the collector would copy it page by page
    torch.set_num_threads(1)
    # Not even asked which operators could be compiled: that runs compilers for a second, and gloo serves.
    deepspeed.ops.__compatible_ops__ = {}
    try:
        try:
            deepspeed.init_distributed("gloo", verbose=False)
        except RuntimeError as error:
            raise RuntimeError(_NOT_CONNECTED) from error
        sender.send_bytes(pickle.dumps((False, function(*args))))  # tensors by value, not by shared memory
    except BaseException:
        sender.send_bytes(pickle.dumps((True, traceback.format_exc())))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
