# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps where each rank was last seen, for the error that one of them does not come: a backend names a timeout, never
the rank."""

from __future__ import annotations

import threading
import weakref
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import distributed_c10d

_READING_S = 1.0  # the store may be on a host that is gone, or of the rank that stands still


class Whereabouts:
    """Writes this rank's place to the store by which the ranks have found each other, and reads those of the others.

    Args:
        group: the process group of the ranks, which names the places.
    """

    def __init__(self, group, rank: int, world_size: int):
        self._rank = rank
        self._keys = [f"deepspeed_acco/{group.group_name}/{other}" for other in range(world_size)]
        self._place = ""
        self._store: Any = None
        with suppress(AttributeError, RuntimeError):  # neither older torch nor every store can
            self._store = _connection()
        self.note("at the start")

    def note(self, place: str) -> None:
        """Writes that this rank is at ``place``, a few words that follow "last seen". It waits for nobody."""
        if place == self._place or self._store is None:
            return
        self._place = place
        with suppress(RuntimeError):  # the store has ended, with the rank that holds it: what follows says more
            self._store.set(self._keys[self._rank], place)

    def of_others(self) -> str:
        """Returns a sentence with the ranks that were last seen somewhere else than this one; empty where none was, or
        where the store does not answer within a second."""
        if self._store is None:
            return ""
        places: dict[int, str] = {}
        reader = threading.Thread(target=self._read, args=(self._store, places), daemon=True)
        reader.start()
        reader.join(_READING_S)
        if reader.is_alive():
            self._store = None  # its connection is taken by the thread
            _connections.clear()
            return ""
        ranks_at: dict[str, list[int]] = {}
        for rank, place in places.items():
            if place != self._place:
                ranks_at.setdefault(place, []).append(rank)
        told = [f"{_ranks(ranks)} {place}" for place, ranks in ranks_at.items()]
        return f"Last seen: {'; '.join(told)}; this rank {self._place}. " if told else ""

    def _read(self, store: Any, places: dict[int, str]):
        with suppress(RuntimeError):
            store.wait(self._keys, timedelta(seconds=_READING_S))
            places.update((rank, store.get(key).decode()) for rank, key in enumerate(self._keys))


# Of the store of all ranks: this module's own to it. Weak, or the store would outlive the ranks' world.
_connections: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _connection() -> Any:
    """Returns a connection to the store for these notes alone: on torch's own the thread of the rounds would wait
    behind whatever the main thread waits for, which may be a rank that waits for this round. All engines of a process
    share it, since torch keeps some kilobytes of each that is closed."""
    store: Any = distributed_c10d._get_default_store()
    if store not in _connections:
        _connections[store] = store.clone()
    return _connections[store]


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4])) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
