"""Ranks that build an engine together tell each other whether their config has a gradmix block, before any
collective: by the key-value store of the default process group, since a rank without a block would never
come to a collective of ours.
"""

import contextlib
import copy
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ds_gradmix.comm.consistency import MismatchError, fingerprint_of
from ds_gradmix.log import logger

TIMEOUT_S = float(os.environ.get("GRADMIX_PEER_TIMEOUT", "10"))
_NOTICE_S = 2.0  # what a rank waits before it ends, so that others can read why


class PeerCheck:
    """What the ranks of one group announce for the engine that they are about to build together.

    Engines are distinguished by the ranks of the group and their number in it, so that those built on
    different ranks do not interfere. A rank sends a few small requests, however large the group is. `fault`
    is what is wrong with this rank's config, None if it has a valid block.
    """

    def __init__(self, store: distributed_c10d.Store, ranks: Sequence[int], fault: str | None) -> None:
        group = f"gradmix/{fingerprint_of([str(rank) for rank in ranks]):x}"
        number = store.add(f"{group}/engines of rank {dist.get_rank()}", 1)
        self._store = distributed_c10d.PrefixStore(f"{group}/{number}", store)
        self._size = len(ranks)
        if fault is None:
            self._store.add("blocks", 1)
        else:
            self._store.set(f"fault {self._store.add('faults', 1)}", f"rank {dist.get_rank()} has {fault}")

    def wait(self) -> None:
        """On a rank with a block: wait for what the others announce, `GRADMIX_PEER_TIMEOUT` seconds at most.

        Ranks that announce nothing in time are only warned about: they may be slow, and DeepSpeed's own
        collectives wait for them.
        """
        _poll(lambda: self._count("faults") > 0 or self._is_complete(), TIMEOUT_S)
        if self._count("faults"):
            _poll(self._is_complete, 1.0)  # to name them all
        elif not self._is_complete():
            logger.warning(
                f"ds_gradmix: after {TIMEOUT_S:g} s only {self._count('blocks')} of {self._size} ranks build "
                "the engine; waiting for the others, which must be started with ds_gradmix, too"
            )

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Build the engine in this context, without waiting for anybody.

        DeepSpeed's first collective waits in vain for ranks that raise, so a thread logs what they raise for
        if it is known only later; the launcher then ends this rank, if the collective does not.

        Raises:
            MismatchError: naming every rank without a valid block, at once, or when the collective fails.
        """
        if message := self._mismatch():
            self.leave()
            raise MismatchError(message)
        built, found = threading.Event(), list[str]()

        def look() -> None:
            with contextlib.suppress(RuntimeError):  # the store may end
                peers = copy.copy(self)
                # A connection of its own, since one that a collective waits on is locked.
                peers._store = getattr(self._store, "clone", lambda: self._store)()
                while not (message := peers._mismatch()) and not peers._is_complete() and not built.wait(0.2):
                    pass
                if message:
                    found.append(message)
                    logger.error(f"ds_gradmix: {message}")
                    peers._count("seen", 1)

        if not self._is_complete():
            threading.Thread(target=look, daemon=True).start()
        try:
            yield
        except Exception as error:
            if found:
                raise MismatchError(found[0]) from error
            raise
        finally:
            built.set()

    def leave(self) -> None:
        """Wait a moment for the others to read what was announced: the store may end with this rank."""
        with contextlib.suppress(RuntimeError):
            self._count("seen", 1)
            _poll(lambda: self._size in (self._count("seen"), self._count("faults")), _NOTICE_S)

    def _mismatch(self) -> str | None:
        """What is wrong, once some ranks have announced a block and some have not."""
        faults = self._count("faults")
        if not faults or not self._count("blocks"):
            return None
        whose = "; ".join(sorted(self._store.get(f"fault {i + 1}").decode() for i in range(faults)))
        return f"building the engine: {whose}, while others have one; give every rank the same config"

    def _count(self, name: str, more: int = 0) -> int:
        return int(self._store.add(name, more))

    def _is_complete(self) -> bool:
        return self._count("faults") + self._count("blocks") >= self._size


def announce(groups: Iterable[Sequence[int]], fault: str | None) -> list[PeerCheck]:
    """Announce to each group what this rank's config holds; nothing where there is no store to do it by."""
    store = distributed_c10d._get_default_store() if dist.is_initialized() else None
    return [PeerCheck(store, ranks, fault) for ranks in groups if len(ranks) > 1] if store else []


def _poll(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline, pause_s = time.monotonic() + timeout_s, 0.005
    while not condition() and time.monotonic() < deadline:
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.2)
