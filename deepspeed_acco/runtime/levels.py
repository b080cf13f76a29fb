# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Says which ranks share a host, so that the slow link between hosts carries each byte once.

A round reduces the gradients inside each host first and then between the hosts, and gathers the weights the other way
round. Rank ``(h, j)`` is the j-th of host h. It exchanges with its *column*, the j-th ranks of all hosts, and with its
*row*, the ranks of its host. In the communication buffer the shards lie column by column, so that what a level sends
or receives is contiguous.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Levels:
    """Holds the ranks of each host, as many in each.

    Attributes:
        hosts: the data-parallel ranks of each, ascending. Hosts of one rank each are one level: between hosts.
    """

    hosts: tuple[tuple[int, ...], ...]

    @classmethod
    def flat(cls, world_size: int) -> Levels:
        """Returns one level, in which every rank is a host of its own."""
        return cls.consecutive(world_size, 1)

    @classmethod
    def consecutive(cls, world_size: int, ranks_per_host: int) -> Levels:
        """Returns hosts of so many consecutive ranks; ``ranks_per_host`` divides ``world_size``."""
        firsts = range(0, world_size, ranks_per_host)
        return cls(tuple(tuple(range(first, first + ranks_per_host)) for first in firsts))

    @property
    def host_count(self) -> int:
        """Returns the number of hosts, H."""
        return len(self.hosts)

    @property
    def ranks_per_host(self) -> int:
        """Returns the ranks of each host, k."""
        return len(self.hosts[0])

    @property
    def world_size(self) -> int:
        """Returns the number of ranks, N = H k."""
        return self.host_count * self.ranks_per_host

    @property
    def is_flat(self) -> bool:
        """Tells whether there is one level alone."""
        return self.ranks_per_host == 1

    @cached_property
    def _rows(self) -> dict[int, tuple[int, ...]]:
        return {rank: ranks for ranks in self.hosts for rank in ranks}

    @cached_property
    def _columns(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(sorted(ranks)) for ranks in zip(*self.hosts))  # process groups have this order

    def row(self, rank: int) -> tuple[int, ...]:
        """Returns the ranks of that rank's host."""
        return self._rows[rank]

    def column(self, rank: int) -> tuple[int, ...]:
        """Returns the ranks, one of each host, with which that rank exchanges between hosts."""
        return self._columns[self.row(rank).index(rank)]

    @cached_property
    def _places(self) -> dict[int, int]:
        return {rank: place for place, rank in enumerate(itertools.chain(*self._columns))}

    def place(self, rank: int) -> int:
        """Returns the place of that rank's shard in the communication buffer, counted in shards: column by column."""
        return self._places[rank]

    def __str__(self) -> str:
        return f"{self.host_count} hosts x {self.ranks_per_host} ranks"


def levels_of(hosts: Sequence[Hashable]) -> tuple[Levels, str | None]:
    """Finds the levels of ranks that name their hosts.

    Args:
        hosts: what each rank calls its host, in the order of the ranks.

    Returns:
        The levels, and why they are flat although some ranks share a host; None where that is not so.
    """
    ranks_of: dict[Hashable, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks_of.setdefault(host, []).append(rank)
    counts = [len(ranks) for ranks in ranks_of.values()]
    if len(counts) == 1:  # no slow link; the direct exchange moves the least
        return Levels.flat(len(hosts)), None
    if len(set(counts)) > 1:
        return Levels.flat(len(hosts)), f"the hosts have {', '.join(map(str, counts))} ranks, not as many each"
    return Levels(tuple(tuple(ranks) for ranks in ranks_of.values())), None
