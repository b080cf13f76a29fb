# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Checks the files with master weights and AdamW state against this run: its own shard, or a universal checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from ..algorithm.schedules import SCHEDULES
from ..runtime.communicator import ranks_of
from . import checkpoint_content as content
from .checkpoint_content import require, require_scaler, require_tensor
from .checkpoint_files import CheckpointRefused, read, read_mapping
from .checkpoint_state import FORMAT, KEY, from_state
from .saving import SUFFIX

_MOMENTS = {"exp_avg": -math.inf, "exp_avg_sq": 0.0}  # and the lowest value that it can have
# Flags of torch.optim.Adam(W) and FusedAdam that change the arithmetic, with the value that ACCO computes.
_GROUP_FLAGS = {"amsgrad": False, "maximize": False, "bias_correction": True, "decoupled_weight_decay": True}


def check_shard(engine, load_dir: str, tag: str, steps: Any) -> str:
    """Requires this rank's shard, and returns which weights training would begin at.

    Args:
        steps: what the file with the module says.
    """
    optimizer = engine.optimizer
    path = engine._get_zero_ckpt_name(load_dir, tag)
    if not os.path.isfile(path):
        folder, name = os.path.split(path)
        other = os.path.join(folder, name.removeprefix("bf16_") if name.startswith("bf16_") else f"bf16_{name}")
        if os.path.isfile(other):
            raise CheckpointRefused(
                f"{other} was saved {'with' if 'bf16_' in other else 'without'} bf16 and this run trains "
                f"{'without' if 'bf16_' in other else 'with'} it. Set the same precision, or pass load_module_only=True"
            )
    saved = read_mapping(path).get("optimizer_state_dict")
    state: Mapping[str, Any] = saved if isinstance(saved, Mapping) else {}
    saved_masters, base = state.get("single_partition_of_fp32_groups"), state.get("base_optimizer_state")
    if saved_masters is None or base is None:
        raise CheckpointRefused(f"{path} was not saved by ZeRO stage 1 or 2. Load it with load_optimizer_states=False")
    if not isinstance(base, Mapping):
        raise CheckpointRefused(
            f"{path} was saved with zero_optimization.elastic_checkpoint = true; allowed: false. Load it with AdamW, "
            "save it again with false, or pass load_optimizer_states=False"
        )
    require(state, content.SHARD, path)
    require(base, content.BASE, f"{path}: base_optimizer_state")
    _check_global(engine, state, path)
    _check_origin(state.get(KEY), engine, steps, path)
    masters = optimizer.single_partition_of_fp32_groups
    if len(saved_masters) != len(masters):
        raise CheckpointRefused(
            f"{path} has {len(saved_masters)} parameter groups and this run has {len(masters)}. Build the optimizer "
            "with the same groups, or pass load_optimizer_states=False"
        )
    if state["partition_count"] != optimizer.partition_count:
        raise CheckpointRefused(
            f"{path} has partition_count = {state['partition_count']} and this run has "
            f"{optimizer.partition_count}: it was saved by another number of ranks, or edited. Load another checkpoint"
        )
    is_moved = _is_moved_by_deepspeed(optimizer, state)
    if not is_moved:
        _check_placement(optimizer, state, saved_masters, path)
    for index, saved_master in enumerate(saved_masters):
        where = f"{path}: the shard of master weights of parameter group {index}"
        require_tensor(saved_master, where, dtype=masters[index].dtype, is_flat=True)
    _check_groups(base["param_groups"], len(masters), path)
    for index, group in enumerate(base["param_groups"]):
        require(group, content.SHARD_GROUP, f"{path}: parameter group {index}")
        moments = base["state"].get(group["params"][0])
        moments = moments if isinstance(moments, Mapping) else {}
        if any(moment not in moments for moment in (*_MOMENTS, "step")):
            raise CheckpointRefused(
                f"{path} has no AdamW state (exp_avg, exp_avg_sq, step) for parameter group {index}. Load it with "
                "load_optimizer_states=False"
            )
        require(moments, content.STEP, f"{path}: parameter group {index}")
        for moment, lowest in _MOMENTS.items():
            numel = None if is_moved else masters[index].numel()
            where = f"{path}: {moment} of parameter group {index}"
            require_tensor(moments[moment], where, numel, masters[index].dtype, lowest, is_flat=True)
    return _check_key(state.get(KEY), optimizer, path)


def _check_global(engine, state, path) -> None:
    """Checks what DeepSpeed takes over whatever the parameters are: of a shard, or of a universal checkpoint."""
    require(state, content.GLOBAL, path)
    require_scaler(state, path, is_needed=engine.fp16_enabled())
    if state.get("clip_grad", 0) > 0 and not getattr(engine.optimizer, "compute_grad_norm", True):
        raise CheckpointRefused(
            f"{path} was saved with gradient_clipping = {state['clip_grad']} and this run has "
            "zero_optimization.compute_grad_norm = false. Set it to true"
        )


def _is_moved_by_deepspeed(optimizer, state) -> bool:
    """Tells whether DeepSpeed moves the parameters inside the shards while it loads them: where alignment of single
    parameters was added since (zero_optimization.parameter_alignment, not in older versions)."""
    alignment = getattr(optimizer, "round_robin_bit16_padding", [])
    return "param_alignment_paddings" not in state and any(any(paddings) for paddings in alignment)


def _check_placement(optimizer, state, saved_masters, path) -> None:
    """Requires the same parameters at the same places of the shards."""
    own = [
        {name: (fragment.start, fragment.numel) for name, fragment in group.items()}
        for group in optimizer._param_slice_mappings
    ]
    theirs = [
        {name: (fragment.start, fragment.numel) for name, fragment in group.items()}
        for group in state.get("param_slice_mappings", [])
    ]
    alignment = getattr(optimizer, "round_robin_bit16_padding", None)
    is_aligned_otherwise = alignment is not None and state.get("param_alignment_paddings", alignment) != alignment
    if (theirs and theirs != own) or is_aligned_otherwise:
        raise CheckpointRefused(
            f"{path} has the parameters at other places of the shard: it is of another model, or was saved with other "
            "zero_optimization settings or parameter groups. Set the same ones, or convert it with ds_to_universal.py"
        )
    for index, (saved, master) in enumerate(zip(saved_masters, optimizer.single_partition_of_fp32_groups)):
        if saved.numel() not in (master.numel(), master.numel() - optimizer.groups_padding[index]):
            raise CheckpointRefused(
                f"{path} is of another model: its shard of parameter group {index} has {saved.numel()} elements and "
                f"this run's has {master.numel()}. Load a checkpoint of this model"
            )


def _check_groups(groups, count: int, path) -> None:
    if len(groups) != count:
        raise CheckpointRefused(
            f"{path} has {len(groups)} parameter groups and this run has {count}. Build the optimizer with the same "
            "groups"
        )
    for index, group in enumerate(groups):
        require(group, content.GROUP, f"{path}: parameter group {index}")
        for flag, allowed in _GROUP_FLAGS.items():
            is_plain_adam = flag == "decoupled_weight_decay" and not group["weight_decay"]
            if bool(group.get(flag, allowed)) != allowed and not is_plain_adam:
                raise CheckpointRefused(
                    f"{path} was trained with {flag} = {group[flag]!r} in parameter group {index}; ACCO computes AdamW "
                    f"with {flag} = {allowed}. Pass load_optimizer_states=False to begin with fresh AdamW state"
                )


def _check_origin(state, engine, steps, path) -> None:
    """Requires the shard of this rank, of the step of the file with the module; older files do not say."""
    if not isinstance(state, Mapping):
        return
    rank, own = state.get("rank"), engine.optimizer.origin["rank"]
    if rank is not None and rank != own:
        raise CheckpointRefused(
            f"{path} is the shard of data-parallel rank {rank}, and rank {own} would load it. Take the files as they "
            "were saved"
        )
    if state.get("global_steps", steps) != steps:
        beside = [name for name in os.listdir(os.path.dirname(path)) if name.endswith(SUFFIX)]
        newer = f": the newer ones are complete and still named {', '.join(sorted(beside))}; rename them"
        raise CheckpointRefused(
            f"{path} was saved at step {state['global_steps']}, and the file with the module beside it at step "
            f"{steps}. Take all files of one checkpoint{newer if beside else ''}"
        )


def _check_key(state, optimizer, path) -> str:
    if state is None:
        return "true weights"
    where = f'{path}: the key "{KEY}"'
    if not isinstance(state, Mapping):
        raise CheckpointRefused(f"{where} is not what deepspeed_acco writes. Load another checkpoint")
    require(state, {"version": content.ACCO["version"]}, where)
    if state["version"] > FORMAT:
        raise CheckpointRefused(
            f"{path} has format {state['version']} of deepspeed_acco; this version reads {FORMAT} and older ones. "
            "Install a newer deepspeed_acco, or pass load_optimizer_states=False"
        )
    require(state, content.ACCO, where)
    row, live = SCHEDULES.get(state["schedule"]), optimizer.bit16_groups_flat
    may_have = {
        "weights": True,
        "predictions": row is None or row.at_window_end.predicts,
        "before": row is None or row.predicts_locally,
        "changes": state.get("commit_comm", "full") != "full",
    }
    for name, may in may_have.items():
        tensors = state.get(name, [])
        if len(tensors) not in ((0, len(live)) if may else (0,)):
            raise CheckpointRefused(f"{where} has {len(tensors)} {name}. The file was edited: load another checkpoint")
        for index, tensor in enumerate(tensors):
            dtype = torch.uint8 if name == "changes" else live[index].dtype
            require_tensor(tensor, f"{where}: {name} of parameter group {index}", dtype=dtype, is_flat=True)
    needed = [("predictions", "weights"), ("before", "weights"), ("changes", "weights")]
    if row is not None and row.predicts_locally and not may_have["changes"]:
        needed.append(("weights", "before"))
    for name, other in needed:
        if state.get(name) and not state.get(other):
            raise CheckpointRefused(f"{where} has {name} without {other}. The file was edited: load another checkpoint")
    ranks = ranks_of(optimizer.dp_process_group)
    resume, reason = from_state(state, optimizer.settings, optimizer.shard_numels(), ranks)
    saved_by = f"run {state.get('run', 'unknown')}, estimate_fraction {state.get('estimate_fraction')}"
    if resume is None:
        return f"{reason}, {saved_by}"
    return f"{len(resume.live)} {len(resume.predictions)} {len(resume.changes)} {state['window']}, {saved_by}"


def check_universal(engine, folder: str) -> None:
    """Requires all files of a universal checkpoint that this rank would load."""
    optimizer = engine.optimizer
    path = os.path.join(folder, "optimizer_state.pt")
    common = read_mapping(path)
    require(common, {"param_groups": content.BASE["param_groups"]}, path)
    _check_global(engine, common, path)
    _check_groups(common["param_groups"], len(optimizer.bit16_groups), path)
    for param in (param for group in optimizer.bit16_groups for param in group):
        if param._hp_mapping is None:
            continue  # other ranks have it
        _check_universal_parameter(os.path.join(folder, optimizer.param_names[param]), param.numel())


def _check_universal_parameter(folder: str, numel: int) -> None:
    """Checks every file of the folder: DeepSpeed reads them all."""
    names = {name.removesuffix(".pt") for name in os.listdir(folder) if name.endswith(".pt")}
    for name in sorted(names | {"fp32", *_MOMENTS}):
        path = os.path.join(folder, f"{name}.pt")
        if name == "step":
            require({"step": read(path)}, content.STEP, path)
            continue
        saved = read_mapping(path)
        require(saved, {"param": content.TENSOR}, path)
        if name in ("fp32", *_MOMENTS):
            require_tensor(saved["param"], path, numel, torch.float32, _MOMENTS.get(name, -math.inf))
