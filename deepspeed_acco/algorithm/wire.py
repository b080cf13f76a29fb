# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Says in how many bits each round's values travel between the ranks (docs/how-to/slow-links.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .schedules import Round


@dataclass(frozen=True)
class Bits:
    """Holds the bits of a value in one kind of round: 8 or 4; 0: in its dtype.

    Attributes:
        gradient: of a gradient.
        change: of a weight, which then travels as its change against what all ranks hold.
    """

    gradient: int = 0
    change: int = 0

    def __bool__(self) -> bool:
        return bool(self.gradient)


IN_FULL = Bits()
ESTIMATE_COMMS = {"full": IN_FULL, "int8": Bits(8, 8), "int4": Bits(4, 4)}
COMMIT_COMMS = {"full": IN_FULL, "int8": Bits(8, 4)}


@dataclass(frozen=True)
class Wire:
    """Holds the bits of all rounds of a run.

    Attributes:
        estimate: of ESTIMATEs, which lose what their bits cannot say; None: the schedule has none.
        commit: of all rounds that write state. What their bits cannot say stays in the master weights, and comes with
            the next change.
    """

    estimate: Bits | None = IN_FULL
    commit: Bits = IN_FULL

    def of(self, this: Round) -> Bits:
        """Returns the bits of that round."""
        if this.writes_state:
            return self.commit
        assert self.estimate is not None, "a round of another schedule"
        return self.estimate

    def rounds(self) -> Iterator[Bits]:
        """Yields the bits of each kind of round that the run has."""
        yield self.commit
        if self.estimate is not None:
            yield self.estimate

    @property
    def inner_gradient(self) -> int:
        """Returns the bits of a gradient inside a host, in rounds that quantize; 0: in its dtype. The buffer that they
        leave from is as small as a COMMIT lets it be."""
        return self.commit.gradient
