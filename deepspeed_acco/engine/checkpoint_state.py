# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Writes and reads ACCO's key in DeepSpeed's checkpoint.

Each rank's ZeRO-1 file has one more key here, :data:`KEY`: what training stands on, which is not the true weights.
Everything else is as DeepSpeed writes it, so that its tools and its own AdamW read it.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import torch

from ..algorithm.schedules import SCHEDULES
from ..optim.quantization import message_bytes
from ..runtime.communicator import Communicator
from ..runtime.states import ResumeState
from ..settings import Settings

KEY = "acco"
FORMAT = 1  # a reader refuses files of a larger one


def to_state(resume: ResumeState, settings: Settings, window: int) -> dict[str, Any]:
    """Returns what is saved under :data:`KEY`: plain tensors, numbers and one word.

    ``weights`` and ``predictions`` are this rank's shards, 1-D in the weights' dtype, one per parameter group with its
    padding; empty where training stands on the true weights and nothing is predicted. Of ``local`` ``weights`` are
    whole, since no rank has those of another, and there is ``before``, this rank's shards. Where a COMMIT brings
    changes there are ``commit_comm`` and, of one that is not installed yet, ``changes``: this rank's records, uint8.
    """
    sends_changes = bool(settings.wire.commit.change)
    return {
        "version": FORMAT,
        "schedule": settings.schedule,
        "window": window,
        "grad_norm": resume.grad_norm,
        "weights": resume.live,
        "predictions": resume.predictions,
        **({"before": resume.before} if resume.before else {}),
        **({"commit_comm": settings.commit_comm, "changes": resume.changes} if sends_changes else {}),
        **({"forgets_step": True} if resume.forgets_step else {}),
    }


def origin(comm: Communicator) -> dict[str, Any]:
    """Returns what tells this run's and this rank's files from others; every rank must call it."""
    return {"run": comm.gather_from_all(uuid.uuid4().hex)[0], "rank": comm.rank}


def from_state(
    state: Mapping[str, Any] | None, settings: Settings, shard_numels: list[int], ranks: int
) -> tuple[ResumeState | None, str]:
    """Returns what training stood on, or None and why it must begin at the true weights."""
    if state is None:
        return None, "the checkpoint has none (it is another optimizer's)"
    for key, now in (("schedule", settings.schedule), ("commit_comm", settings.commit_comm)):
        saved = state.get(key, getattr(Settings, key))
        if saved != now:
            return None, f'the checkpoint was saved with the {key} "{saved}"'
    before, changes, bits = state.get("before", []), state.get("changes", []), settings.wire.commit.change
    expected = {
        "weights": [ranks * numel for numel in shard_numels] if before else shard_numels,
        "predictions": shard_numels,
        "before": shard_numels,
        "changes": [message_bytes(numel, bits) for numel in shard_numels] if bits else [],
    }
    for name, numels in expected.items():
        if state.get(name) and [tensor.numel() for tensor in state[name]] != numels:
            return None, "this version of DeepSpeed pads the shards differently"
    pending = SCHEDULES[settings.schedule].at_window_end if changes else None
    beside = (before, changes, pending, state.get("forgets_step", False))
    return ResumeState(state["weights"], state["predictions"], state["grad_norm"], *beside), ""


def without_tensor_steps(base: dict[str, Any]) -> dict[str, Any]:
    """Returns AdamW's state with ``step`` as a plain number, which torch's and DeepSpeed's own AdamWs can read."""
    state = {
        key: {**moments, "step": int(moments["step"])} if torch.is_tensor(moments.get("step")) else moments
        for key, moments in base["state"].items()
    }
    return {**base, "state": state}
