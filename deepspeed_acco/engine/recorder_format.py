# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Declares what a recorder and those who start it or read it agree on: the folder, and the lines of a rank's file.

It stands apart because neither a launcher nor a reader needs PyTorch. Every field may be null in a file, and missing in
one of an earlier version, but those without a default.
"""

from __future__ import annotations

from dataclasses import dataclass

RECORD_FOLDER = "DEEPSPEED_ACCO_RECORD"  # the environment variable that names the folder of a run's records
RECORD_RUN = "DEEPSPEED_ACCO_RECORD_RUN"  # likewise the run's id, by which its files are told from another's


@dataclass(frozen=True, kw_only=True)
class RankHeader:
    """Holds the first line of ``rank{R}.jsonl``: the run as this rank sees it.

    Attributes:
        schedule: ACCO's, and likewise ``accumulation``, ``estimate_comm`` and ``commit_comm``; None with another
            optimizer.
        stage: of ZeRO.
        numel: trainable parameters of the whole model.
        weight_bytes, comm_bytes, accumulation_bytes: of one value: a weight, what is communicated, a summed gradient.
        n: micro-batches of a (nominal) window on one rank.
        a: of them in phase A; None where there is one phase.
        micro_batch: samples of a micro-batch.
        samples_per_step: of a (nominal) window, all ranks together.
        run: the id that whoever started the run gave it; None where nobody did.
    """

    rank: int
    world_size: int | None = None
    optimizer: str | None = None
    schedule: str | None = None
    accumulation: str | None = None
    estimate_comm: str | None = None
    commit_comm: str | None = None
    stage: int | None = None
    numel: int | None = None
    weight_bytes: int | None = None
    comm_bytes: int | None = None
    accumulation_bytes: int | None = None
    n: int
    a: int | None = None
    micro_batch: int
    samples_per_step: int
    device: str | None = None
    torch: str | None = None
    deepspeed: str | None = None
    run: str | None = None


@dataclass(frozen=True, kw_only=True)
class RankStep:
    """Holds any further line of ``rank{R}.jsonl``: an optimizer step.

    Attributes:
        step: its number, from 1.
        step_s: from the end of the step before to its end; None for the first.
        inside_s: of that inside ``engine.step()``.
        round_s: of ACCO's rounds that finished since the line before: their time together.
        exposed_s: what training waited for them.
        rounds: their number.
        estimate_s: of an ESTIMATE among them, the mean.
        sent_bytes, received_bytes: the payload of this rank in them, where the optimizer counts it.
        interface_bytes: what the host sent since the line before, by the kernel's count of the interface that the
            collectives use, with all headers. Its first rank (of LOCAL_RANK 0) tells it, where that interface is named.
        samples: what this rank computed in an adaptive window; None where windows are fixed.
        peak_bytes: on CUDA of allocated memory, else of resident memory, since the warm-up.
        looked: whether an evaluation or a checkpoint fell into it.
        loss: never known to the recorder.
        a: micro-batches of phase A in a fixed window; None where there is one phase.
    """

    step: int
    step_s: float | None = None
    inside_s: float | None = None
    round_s: float | None = None
    exposed_s: float | None = None
    rounds: int | None = None
    estimate_s: float | None = None
    sent_bytes: float | None = None
    received_bytes: float | None = None
    interface_bytes: float | None = None
    samples: int | None = None
    peak_bytes: float | None = None
    looked: bool = False
    loss: float | None = None
    a: int | None = None
