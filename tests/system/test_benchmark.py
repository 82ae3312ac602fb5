"""The benchmark's hosts, and its quick mode: what an exchange sends is held to its bounds here."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks import cases
from ds_gradmix.config import SLOTS, Slot
from ds_gradmix.rules import MIXING, GradientFreeMixing, Mixing, RngKey

ROOT = Path(__file__).parents[2]
SAY_RANK = "import os; print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])"
LISTEN = (
    "import socket, sys\n"
    "server = socket.create_server((sys.argv[1], 5000)); server.settimeout(10)\n"
    "print('ready', flush=True)\n"
    "server.accept()[0].sendall(b'hello')\n"
)
CONNECT = (
    "import socket, sys\n"
    "connection = socket.create_connection((sys.argv[1], 5000), timeout=10)\n"
    "print(connection.recv(5).decode())\n"
)


def running(code: str) -> Callable[[], None]:
    """For a rank: another Python, since this one is not made to be forked and go on."""
    return partial(os.execv, sys.executable, [sys.executable, "-c", code])


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.hosts")


@pytest.fixture
def namespaces(hosts: ModuleType) -> ModuleType:
    missing = hosts.why_no_namespaces()
    if missing is not None:
        pytest.skip(f"network namespaces: {missing}")
    return hosts


def names_of_namespaces() -> set[str]:
    listing = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True, timeout=10)
    return {line.split()[0] for line in listing.stdout.splitlines()}


@pytest.mark.timeout(40)
def test_hosts_reach_each_other_and_count_what_they_send(namespaces: ModuleType) -> None:
    with namespaces.network(2) as (first, second):
        listen = first.command([sys.executable, "-c", LISTEN, first.address])
        with subprocess.Popen(listen, stdout=subprocess.PIPE, text=True) as listener:
            try:
                assert listener.stdout is not None and listener.stdout.readline() == "ready\n"
                connect = second.command([sys.executable, "-c", CONNECT, first.address])
                heard = subprocess.run(connect, check=True, capture_output=True, text=True, timeout=20)
            finally:
                listener.kill()
        assert heard.stdout == "hello\n"
        counter = f"/sys/class/net/{second.interface}/statistics/tx_bytes"
        sent = subprocess.run(
            second.command(["cat", counter]), check=True, capture_output=True, text=True, timeout=10
        )
        assert 100 < int(sent.stdout) < 5000, "a handshake and its acknowledgements, nobody else's traffic"


@pytest.mark.timeout(30)
def test_hosts_are_gone_after_an_exception(namespaces: ModuleType) -> None:
    names: set[str] = set()
    with pytest.raises(ZeroDivisionError), namespaces.network(2) as ranks:
        names = {host.namespace for host in ranks}
        assert names <= names_of_namespaces()
        _ = 1 / 0
    assert names and not names & names_of_namespaces()


@pytest.mark.timeout(30)
def test_a_failing_rank_ends_the_others_and_is_named(hosts: ModuleType, tmp_path: Path) -> None:
    code = "import os, sys, time; sys.exit('no luck') if os.environ['RANK'] == '1' else time.sleep(60)"
    with pytest.raises(RuntimeError, match=r"rank 1 exited with 1; its log ends:\nno luck"):
        hosts.run_ranks(hosts.loopback(2), running(code), tmp_path, timeout_s=20)


@pytest.mark.timeout(30)
def test_ranks_that_hang_are_ended(hosts: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="rank 0 did not end in time"):
        hosts.run_ranks(hosts.loopback(2), running("import time; time.sleep(60)"), tmp_path, timeout_s=1)


@pytest.mark.timeout(30)
def test_each_rank_knows_its_place(hosts: ModuleType, tmp_path: Path) -> None:
    hosts.run_ranks(hosts.loopback(2), running(SAY_RANK), tmp_path, timeout_s=20)
    assert [(tmp_path / f"rank{rank}.log").read_text() for rank in (0, 1)] == [
        "rank 0 of 2\n",
        "rank 1 of 2\n",
    ]


def test_a_free_port_is_free(hosts: ModuleType) -> None:
    with socket.create_server(("127.0.0.1", hosts.free_port(hosts.loopback(1)[0]))):
        pass


class Median(GradientFreeMixing):
    """A rule that is new in the repository."""

    width: int = 3

    def weights(self, key: RngKey, num_workers: int, num_parameters: int) -> npt.NDArray[np.float64]:
        return np.full((1, num_workers), 1 / num_workers)


def test_a_new_rule_is_in_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SLOTS, "mixing", Slot(Mixing, (*MIXING, Median)))
    rule = {"type": Median.type_name(), "params": {"width": 3}}
    assert cases.usual_blocks("mixing")[Median.type_name()] == {"mixing": rule}
    assert {*cases.usual_blocks("mixing", "scaling")} <= {*cases.RULES, Median.type_name()}


@pytest.mark.timeout(280)
def test_an_exchange_sends_less_than_stock(hosts: ModuleType, tmp_path: Path) -> None:
    """Runs wherever there is a network: in namespaces, or without root over the loopback interface."""
    numbers = tmp_path / "numbers.json"
    argv = [sys.executable, str(ROOT / "benchmarks" / "exchange.py"), "--quick", "--rounds", "1"]
    run = subprocess.run(
        [*argv, "--timeout", "240", "--json", str(numbers)], capture_output=True, text=True, timeout=260
    )
    assert numbers.exists(), run.stdout + run.stderr
    rows = json.loads(numbers.read_text())
    assert {(row["owners"], row["rule"]) for row in rows} == {
        *((owners, rule) for owners in ("even", "one owner") for rule in ("GAF", "GAF+VRGD")),
        ("every rank", "GAF scope model"),
    }
    for row in rows:
        most = {"even": 0.55, "one owner": 0.66, "every rank": 1.03}[row["owners"]]
        assert row["bytes_ratio"] <= most, run.stdout
        # Were stock's gradients to bypass the interface, any ratio could come out.
        assert 1.0 <= row["stock_sent_bytes"] / row["stock_theory_bytes"] <= 1.03, run.stdout
    assert run.returncode == 0, run.stdout + run.stderr
