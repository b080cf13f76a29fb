# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Declares what there can be of a round, and what a look and a checkpoint keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from ..algorithm.schedules import Round


class RoundState(Enum):
    """Says what there is of a round."""

    IDLE = "idle"  # none: the live weights are the newest true ones
    IN_FLIGHT = "in flight"
    ARRIVED = "arrived"  # finished; what it gathered lies in X and is not installed


@dataclass(frozen=True)
class Look:
    """Holds what hiding the true weights again takes."""

    version: int  # of the weights that training had
    predictions: list[Tensor] | None = (
        None  # this rank's shards of them, where X had to hold the true weights meanwhile
    )
    kept: list[Tensor] = field(default_factory=list)  # copies in host memory of P, then of X if it was overwritten


@dataclass(frozen=True)
class ResumeState:
    """Holds where training stands between two rounds, beyond the true weights: this rank's shards, 1-D in the weights'
    dtype, one per parameter group."""

    live: list[Tensor]  # of the weights that training computes at; empty where they are the true ones
    predictions: list[Tensor]  # of a finished prediction that is not installed yet; empty where there is none
    grad_norm: float  # of the newest COMMIT
    # local: of the true weights one commit before, and ``live`` is the whole, not a shard; else empty
    before: list[Tensor] = field(default_factory=list)
    # where a COMMIT brings changes: this rank's records of one that is not installed yet, uint8
    changes: list[Tensor] = field(default_factory=list)
    pending: Round | None = None  # which round they are of; None: there are none
    forgets_step: bool = False  # local: they also bring what somebody else wrote
