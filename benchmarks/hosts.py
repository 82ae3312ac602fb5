"""Hosts for a benchmark or a test: each a network namespace with one interface, all joined by a bridge.

Ranks of one machine would talk over the loopback interface, whose counter adds up what all of them send. In a
namespace a rank has a veth interface that carries its traffic and no other, counted by the kernel, as on a
cluster of `W` machines. The bridge has a namespace too, so the machine's own network is left as it is.
Removing a namespace removes its interfaces, and they are removed whatever happens inside the `with` block.

Namespaces need root and `ip` (iproute2); `why_no_namespaces` says what is missing. `loopback` is the
substitute: plain processes, and one counter for all of them.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

INTERFACE = "eth0"
_serial = count()


@dataclass(frozen=True)
class Host:
    """Where a rank runs: a namespace (None: the machine itself), its interface, and its address there."""

    namespace: str | None
    interface: str
    address: str

    def command(self, argv: Sequence[str]) -> list[str]:
        """`argv` as it runs on this host; `ip netns exec` becomes `argv`, so the pid stays."""
        return list(argv) if self.namespace is None else ["ip", "netns", "exec", self.namespace, *argv]


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
def network(num_hosts: int) -> Iterator[list[Host]]:
    """Hosts 10.77.0.1, 10.77.0.2, … on one bridge, gone after the block however it ends; needs root."""
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
        yield hosts
    finally:
        for name in reversed(made):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30)


def set_link(host: Host, state: str) -> None:
    """Takes the host off the network ("down"), so that nothing it sends arrives, or puts it back ("up")."""
    assert host.namespace is not None
    _ip("-n", host.namespace, "link", "set", host.interface, state)


def loopback(num_hosts: int) -> list[Host]:
    """The same number of hosts without root: all of them this machine's loopback interface."""
    return [Host(None, "lo", "127.0.0.1")] * num_hosts


def free_port(host: Host) -> int:
    """A port nobody listens on; in a namespace of our own any will do."""
    if host.namespace is not None:
        return 29500
    with socket.socket() as listener:
        listener.bind((host.address, 0))
        return int(listener.getsockname()[1])


def run_ranks(
    hosts: Sequence[Host], argv: Sequence[str], logs: Path, timeout_s: float, ranks_per_host: int = 1
) -> None:
    """Runs `argv` on every host with the environment of a distributed job, and waits for all of them.

    Each rank's output goes to `logs/rankN.log`. If one fails, or `timeout_s` passes, the others are killed
    and `RuntimeError` carries the end of the log of the rank that failed first.
    """
    port, ranks = free_port(hosts[0]), []
    try:
        for rank in range(len(hosts) * ranks_per_host):
            host = hosts[rank // ranks_per_host]
            with (logs / f"rank{rank}.log").open("w") as log:
                env = os.environ | _rank_env(rank, hosts, ranks_per_host, port)
                ranks.append(
                    subprocess.Popen(host.command(argv), env=env, stdout=log, stderr=subprocess.STDOUT)
                )
        _wait(ranks, logs, timeout_s)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


def _wait(ranks: Sequence[subprocess.Popen[bytes]], logs: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in ranks):
        failed = [rank for rank, process in enumerate(ranks) if process.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for rank, process in enumerate(ranks):
        if process.poll() != 0:
            what = "did not end in time" if process.poll() is None else f"exited with {process.returncode}"
            end = (logs / f"rank{rank}.log").read_text(errors="replace")[-3000:]
            # A rank that still runs is only to blame if none has failed.
            if process.poll() is not None or all(p.poll() in (None, 0) for p in ranks):
                raise RuntimeError(f"rank {rank} {what}; its log ends:\n{end}")


def _rank_env(rank: int, hosts: Sequence[Host], ranks_per_host: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(hosts) * ranks_per_host),
        "LOCAL_RANK": str(rank % ranks_per_host),
        # A rank alone on its host must not see neighbours to share memory with.
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
    # Without link-local addresses IPv6 stays silent, and the counters see the job's packets only.
    _ip("-n", switch, "link", "set", port, "addrgenmode", "none", "master", "bridge")
    _ip("-n", switch, "link", "set", port, "up")
    _ip("-n", host.namespace, "link", "set", INTERFACE, "addrgenmode", "none")
    _ip("-n", host.namespace, "address", "add", f"{host.address}/16", "dev", INTERFACE)
    for interface in ("lo", INTERFACE):
        _ip("-n", host.namespace, "link", "set", interface, "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)
