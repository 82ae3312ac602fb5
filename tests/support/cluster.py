"""A cluster in one machine: hosts with an address, processes and an sshd of their own, and one file system.

A node is a network namespace (see benchmarks/hosts.py) with a PID namespace in it, whose first process is its
sshd. So `pkill` reaches the processes of its own host alone, as on a cluster, and killing that sshd kills all
of them at once, as a power cut does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.hosts import Host, network, set_link, why_no_namespaces

ROOT = Path(__file__).parents[2]
_SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
_SEPARATION = Path("/run/sshd")  # sshd insists on it; the service would have made it
_ALONE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def why_no_cluster() -> str | None:
    """Why there can be no nodes here, or None if there can."""
    tools = ("sshd", "ssh", "ssh-keygen", "pdsh", "pkill", "unshare", "nsenter", "setsid")
    missing = [tool for tool in tools if (_SSHD if tool == "sshd" else shutil.which(tool)) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if (reason := why_no_namespaces()) is not None:
        return reason
    tried = subprocess.run([*_ALONE, "true"], capture_output=True, text=True, timeout=30)
    return None if tried.returncode == 0 else f"`{' '.join(_ALONE)}` failed: {tried.stderr.strip()}"


@dataclass
class Node:
    """A host called `name`, reached by `ssh name` wherever `folder/bin` is first on PATH."""

    name: str
    host: Host
    folder: Path
    _power: subprocess.Popen[str] | None = field(default=None, init=False)

    def boot(self) -> None:
        set_link(self.host, "up")
        log = self.folder / f"{self.name}.log"
        sshd = [*_ALONE, str(_SSHD), "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with log.open("w") as out:
            self._power = subprocess.Popen(self.host.command(sshd), stderr=out, text=True)
        deadline = time.monotonic() + 20
        while "Server listening" not in log.read_text():
            assert self._power.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)

    def lose_power(self) -> None:
        """Every process is gone, and their connections were never closed."""
        assert self._power is not None
        set_link(self.host, "down")
        self._power.kill()
        self._power.wait()

    def command(self, argv: Sequence[str]) -> list[str]:
        """`argv` as it runs on this node, in the project's folder."""
        assert self._power is not None
        (first,) = psutil.Process(self._power.pid).children()
        return ["nsenter", f"--target={first.pid}", "--net", "--pid", "--mount", f"--wd={ROOT}", *argv]

    def run(self, *argv: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(argv), env=env, capture_output=True, text=True, timeout=60, check=False
        )


@contextmanager
def cluster(num_nodes: int, folder: Path) -> Iterator[list[Node]]:
    """Nodes node1, node2, …, booted; gone after the block, with all that ran on them, however it ends."""
    with _separation(), network(num_nodes) as hosts:
        nodes = [Node(f"node{i + 1}", host, folder) for i, host in enumerate(hosts)]
        _write_ssh_files(nodes, folder)
        try:
            for node in nodes:
                node.boot()
            yield nodes
        finally:
            for node in nodes:
                if node._power is not None and node._power.poll() is None:
                    node.lose_power()


@contextmanager
def _separation() -> Iterator[None]:
    if _SEPARATION.exists():
        yield
        return
    _SEPARATION.mkdir(0o755)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            _SEPARATION.rmdir()


def _write_ssh_files(nodes: Sequence[Node], folder: Path) -> None:
    """Keys, configuration, and an `ssh` that reads these instead of the user's own."""
    for name in ("host_key", "user_key"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(keygen, check=True, timeout=30)
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\n"
        "PermitRootLogin prohibit-password\nUsePAM no\nPidFile none\n"
    )
    (folder / "ssh_config").write_text(
        "".join(f"Host {node.name}\n  HostName {node.host.address}\n" for node in nodes)
        + f"Host *\n  User root\n  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n  LogLevel ERROR\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
    )
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(
        f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n'
    )
    (folder / "bin" / "ssh").chmod(0o755)
