# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Holds the parameter groups and settings of the optimizer that a user names or builds; engine/ does the stepping."""

from __future__ import annotations

from torch.optim import Optimizer

from .settings import (
    ACCO_KEYS,
    ADAMW_KEYS,
    Accumulation,
    AdamWKeys,
    Auto,
    CommitComm,
    EstimateComm,
    Lane,
    LrFollows,
    RanksPerHost,
    Settings,
    refuse_unknown,
)

# Not for us: FusedAdam and DeepSpeedCPUAdam read them in the groups of a checkpoint that they load.
FUSED_ADAM_KEYS = {"bias_correction": True, "amsgrad": False}


class ACCO(Optimizer):
    """Trains by AdamW, whose communication and sharded update run behind the gradient computation (arXiv 2406.02613).

    Named in a DeepSpeed JSON as ``"optimizer": {"type": "ACCO", "params": {...}}``, or built by the client and given to
    ``deepspeed.initialize(optimizer=...)``. It works only through a DeepSpeed engine with ZeRO stage 1.

    Args:
        params: parameters or parameter groups; a group may set lr, betas, eps and weight_decay of its own.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW, with its defaults.
        schedule, estimate_fraction, overlap_warmup_steps, accumulation, lane, comm_timeout_s, max_window, lr_follows,
            estimate_comm, commit_comm, ranks_per_host, sm_share: see :class:`deepspeed_acco.settings.Settings`.

    Raises:
        ValueError: for an unknown key or a value out of range, naming the key, the value and what is allowed.
    """

    def __init__(
        self,
        params,
        lr: float = AdamWKeys.lr,
        betas: tuple[float, float] = AdamWKeys.betas,
        eps: float = AdamWKeys.eps,
        weight_decay: float = AdamWKeys.weight_decay,
        schedule: str = Settings.schedule,
        estimate_fraction: float | Auto = Settings.estimate_fraction,
        overlap_warmup_steps: int = Settings.overlap_warmup_steps,
        accumulation: Accumulation = Settings.accumulation,
        lane: Lane = Settings.lane,
        comm_timeout_s: float | None = Settings.comm_timeout_s,
        max_window: int | None = Settings.max_window,
        lr_follows: LrFollows = Settings.lr_follows,
        estimate_comm: EstimateComm = Settings.estimate_comm,
        commit_comm: CommitComm = Settings.commit_comm,
        ranks_per_host: int | RanksPerHost = Settings.ranks_per_host,
        sm_share: float = Settings.sm_share,
        **unknown,
    ):
        refuse_unknown(unknown)
        self.settings = Settings(
            schedule=schedule,
            estimate_fraction=estimate_fraction,
            overlap_warmup_steps=overlap_warmup_steps,
            accumulation=accumulation,
            lane=lane,
            comm_timeout_s=comm_timeout_s,
            max_window=max_window,
            lr_follows=lr_follows,
            estimate_comm=estimate_comm,
            commit_comm=commit_comm,
            ranks_per_host=ranks_per_host,
            sm_share=sm_share,
        )
        AdamWKeys(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)  # checks them
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, **FUSED_ADAM_KEYS))
        self._opt_called = True  # or torch's schedulers warn at their first step that this one never stepped

    def add_param_group(self, param_group) -> None:
        """Adds a group as torch does, with the group's own hyper-parameters checked."""
        misplaced = [key for key in ACCO_KEYS if key in param_group]
        if misplaced:
            raise ValueError(
                f"ACCO: {misplaced[0]} = {param_group[misplaced[0]]!r} in a parameter group is not allowed; it holds "
                "for the whole optimizer. Give it to ACCO(...) or to optimizer.params"
            )
        merged = {**self.defaults, **param_group}
        for key, allowed in FUSED_ADAM_KEYS.items():
            if merged[key] != allowed:
                raise ValueError(
                    f"ACCO: {key} = {merged[key]!r} in a parameter group is not allowed; allowed: {allowed}. Remove it"
                )
        AdamWKeys(**{key: merged[key] for key in ADAMW_KEYS})  # checks them
        super().add_param_group(param_group)

    def complete_groups(self) -> None:
        """Enters what a loaded group of another optimizer lacks."""
        for group in self.param_groups:
            for key, value in FUSED_ADAM_KEYS.items():
                group.setdefault(key, value)

    def step(self, closure=None):
        """Refuses to train so: the engine's ZeRO wrapper updates the shards in the rounds' order.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "ACCO.step() was called directly, which would train plain AdamW without overlap. Train through the engine "
            'of deepspeed.initialize() with "zero_optimization": {"stage": 1}, after `import deepspeed_acco`'
        )
