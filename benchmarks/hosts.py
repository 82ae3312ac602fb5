"""Hosts for a benchmark or a test: network namespaces with one interface each, connected by a bridge.

Ranks of one machine communicate over the loopback interface, whose counter sums the traffic of all of them.
In a namespace a rank has a veth interface that carries its traffic alone, counted by the kernel, as on a
cluster. The bridge has a namespace as well, so the machine's own network does not change. Namespaces and
their interfaces are removed after the `with` block, also after an exception.

Namespaces need root and `ip` (iproute2); `why_no_namespaces` says what is missing. `loopback` is the
substitute: ordinary processes, with one counter for all of them.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from multiprocessing.context import ForkProcess
from pathlib import Path

INTERFACE = "eth0"
_CLONE_NEWNET = 0x40000000
_FORK = multiprocessing.get_context("fork")
_serial = count()


@dataclass(frozen=True)
class Host:
    """Where ranks run: a namespace (None for the machine itself), its interface, and its address."""

    namespace: str | None
    interface: str
    address: str

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` on this host; `ip netns exec` is replaced by it and keeps the pid."""
        return list(argv) if self.namespace is None else ["ip", "netns", "exec", self.namespace, *argv]

    def enter(self) -> None:
        """Move this process into the host's namespace."""
        if self.namespace is None:
            return
        with open(f"/run/netns/{self.namespace}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter {self.namespace}")


def why_no_namespaces() -> str | None:
    """Why network namespaces cannot be made here, or None if they can."""
    if shutil.which("ip") is None:
        return "`ip` (iproute2) is not installed"
    if os.geteuid() != 0:
        return "not root"
    try:
        with network(1):
            return None
    except subprocess.CalledProcessError as error:
        return f"`{' '.join(error.cmd)}` failed: {error.stderr.strip()}"


@contextmanager
def network(num_hosts: int, rate: str | None = None) -> Iterator[list[Host]]:
    """Hosts 10.77.0.1, 10.77.0.2, … on one bridge, which are removed after the block; needs root.

    No host sends or receives faster than `rate`, in the notation of `tc` (`"500mbit"`), if it is given.
    """
    prefix = f"gradmix{os.getpid()}-{next(_serial)}"
    switch, names = f"{prefix}-switch", [f"{prefix}-host{i}" for i in range(num_hosts)]
    made: list[str] = []
    try:
        for name in [switch, *names]:
            _ip("netns", "add", name)
            made.append(name)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        hosts = [Host(name, INTERFACE, f"10.77.{i // 250}.{i % 250 + 1}") for i, name in enumerate(names)]
        for i, host in enumerate(hosts):
            _plug_in(host, switch, f"port{i}")
            if rate is not None:
                _limit(host, INTERFACE, rate)  # what it sends
                _limit(Host(switch, "", ""), f"port{i}", rate)  # and what it is sent
        yield hosts
    finally:
        for name in reversed(made):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30)


def set_link(host: Host, state: str) -> None:
    """Disconnect the host from the network ("down"), or connect it again ("up")."""
    assert host.namespace is not None
    _ip("-n", host.namespace, "link", "set", host.interface, state)


def sent_bytes(interface: str) -> int:
    """The kernel's counter of bytes that an interface in this process's namespace has sent."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    raise ValueError(f"{interface}: no such interface here")


def loopback(num_hosts: int) -> list[Host]:
    """So many hosts that are all this machine, with its loopback interface; needs no root."""
    return [Host(None, "lo", "127.0.0.1")] * num_hosts


def free_port(host: Host) -> int:
    """A port that nothing listens on; in a new namespace every port is free."""
    if host.namespace is not None:
        return 29500
    with socket.socket() as listener:
        listener.bind((host.address, 0))
        return int(listener.getsockname()[1])


def run_ranks(
    hosts: Sequence[Host],
    function: Callable[[], object],
    logs: Path,
    timeout_s: float,
    ranks_per_host: int = 1,
) -> None:
    """Call `function` as every rank, in the environment of a distributed job, and wait for all of them.

    Ranks are forked, so they do not import again what this process has imported. The output of a rank goes to
    `logs/rankN.log`.

    Raises:
        RuntimeError: if a rank fails or `timeout_s` passes, with the end of that rank's log; all ranks are
            killed before.
    """
    port = free_port(hosts[0])
    sys.stdout.flush()
    ranks = []
    for rank in range(len(hosts) * ranks_per_host):
        host = hosts[rank // ranks_per_host]
        env, log = _rank_env(rank, hosts, ranks_per_host, port), logs / f"rank{rank}.log"
        ranks.append(_FORK.Process(target=_be_rank, args=(host, env, log, function), daemon=True))
    try:
        for process in ranks:
            process.start()
        _wait(ranks, logs, timeout_s)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _be_rank(host: Host, env: dict[str, str], log: Path, function: Callable[[], object]) -> None:
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.update(env)
    host.enter()
    function()


def _wait(ranks: Sequence[ForkProcess], logs: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in ranks):
        if any(process.exitcode for process in ranks) or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for rank, process in enumerate(ranks):
        if process.exitcode != 0:
            what = "did not end in time" if process.exitcode is None else f"exited with {process.exitcode}"
            end = (logs / f"rank{rank}.log").read_text(errors="replace")[-3000:]
            # A rank that was still running is named only if none has failed.
            if process.exitcode is not None or not any(p.exitcode for p in ranks):
                raise RuntimeError(f"rank {rank} {what}; its log ends:\n{end}")


def _rank_env(rank: int, hosts: Sequence[Host], ranks_per_host: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(hosts) * ranks_per_host),
        "LOCAL_RANK": str(rank % ranks_per_host),
        # A rank alone on its host must not use shared memory with ranks of other hosts.
        "LOCAL_SIZE": str(ranks_per_host),
        "MASTER_ADDR": hosts[0].address,
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": hosts[rank // ranks_per_host].interface,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def _plug_in(host: Host, switch: str, port: str) -> None:
    assert host.namespace is not None
    _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", host.namespace)
    # Without link-local addresses IPv6 sends nothing, and the counters count the ranks' packets only.
    _ip("-n", switch, "link", "set", port, "addrgenmode", "none", "master", "bridge")
    _ip("-n", switch, "link", "set", port, "up")
    _ip("-n", host.namespace, "link", "set", INTERFACE, "addrgenmode", "none")
    _ip("-n", host.namespace, "address", "add", f"{host.address}/16", "dev", INTERFACE)
    for interface in ("lo", INTERFACE):
        _ip("-n", host.namespace, "link", "set", interface, "up")


def _limit(host: Host, interface: str, rate: str) -> None:
    bucket = ["tbf", "rate", rate, "burst", "256kb", "latency", "100ms"]
    command = host.command(["tc", "qdisc", "add", "dev", interface, "root", *bucket])
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)
