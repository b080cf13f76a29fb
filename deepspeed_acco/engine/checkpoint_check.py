# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Checks every file of a checkpoint before anything of it is loaded.

A ZeRO-1 checkpoint (deepspeed/runtime/engine.py, ``save_checkpoint``) is one file with the module and one file per rank
with its shard of master weights and AdamW state.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .checkpoint_state import FORMAT, KEY, from_state

_MOMENTS = ("exp_avg", "exp_avg_sq")
# Flags of torch.optim.Adam(W) and FusedAdam that change the arithmetic, with the value that ACCO computes.
_GROUP_FLAGS = {"amsgrad": False, "maximize": False, "bias_correction": True, "decoupled_weight_decay": True}


class CheckpointRefused(ValueError):
    """Says that a checkpoint was not loaded; the run in memory is what it was before."""


@dataclass(frozen=True)
class Finding:
    """Tells what one rank found out about a checkpoint; compared over the ranks before any of them loads."""

    tag: str | None  # None: there is no file that names the latest one
    stands_on: str  # which weights the resumed training would begin at
    problem: str  # empty: nothing


@dataclass(frozen=True)
class LoadOptions:
    """Holds the arguments of ``engine.load_checkpoint`` that decide what is loaded."""

    load_module_strict: bool = True
    load_optimizer_states: bool = True
    load_lr_scheduler_states: bool = True
    load_module_only: bool = False
    custom_load_fn: Any = None


def inspect(engine, load_dir: str, tag: str | None, options: LoadOptions) -> Finding:
    """Reads and checks every file that this rank would load, and changes nothing."""
    try:
        tag = _find_tag(engine, load_dir, tag)
        if tag is None:
            return Finding(None, "", "")
        return Finding(tag, _check_files(engine, load_dir, tag, options), "")
    except CheckpointRefused as refused:
        return Finding(tag, "", str(refused))
    except Exception as cause:  # no rank may be missing when the findings are compared
        return Finding(tag, "", f"it could not be checked ({type(cause).__name__}: {cause})")


def require_loadable(load_dir: str, findings: list[Finding]) -> None:
    """Raises CheckpointRefused on every rank when any rank found a problem or the ranks found different things."""
    problems: dict[str, list[int]] = {}
    for rank, finding in enumerate(findings):
        if finding.problem:
            problems.setdefault(finding.problem, []).append(rank)
    if not problems and len(set(findings)) > 1:
        seen = "; ".join(f"rank {rank}: {finding.tag}, {finding.stands_on}" for rank, finding in enumerate(findings))
        problems = {f"the ranks see different checkpoints ({seen}). Give every rank the same folder and tag": []}
    if problems:
        told = "; ".join(
            (f"rank {ranks[0]}: " if len(ranks) == 1 else f"ranks {ranks}: " if ranks else "") + problem
            for problem, ranks in problems.items()
        )
        raise CheckpointRefused(f"ACCO: the checkpoint in {load_dir} was not loaded and the run is unchanged. {told}")


def _find_tag(engine, load_dir, tag):
    if tag is not None:
        return str(tag)
    latest = os.path.join(load_dir, "latest_universal" if engine.load_universal_checkpoint() else "latest")
    if not os.path.isfile(latest):
        return None
    with open(latest, encoding="utf-8") as file:
        named = file.read().strip()
    if not named:
        raise CheckpointRefused(f"{latest} is empty: its writer was stopped. Give tag= of a complete checkpoint")
    return named


def _check_files(engine, load_dir, tag, options: LoadOptions) -> str:
    is_universal = engine.load_universal_checkpoint()
    model_path = engine._get_ckpt_name(load_dir, tag)
    saved = _read(engine, model_path)
    with_optimizer = options.load_optimizer_states and not options.load_module_only
    if not is_universal:
        _check_module(engine.module, saved, options, model_path)
        here = engine.seq_dp_world_size
        if with_optimizer and saved.get("dp_world_size") != here:
            raise CheckpointRefused(
                f"it was saved by {saved.get('dp_world_size')} data-parallel ranks and this run has {here}. Convert it "
                'with ds_to_universal.py (--inject_missing_state) and set "checkpoint": {"load_universal": true}'
            )
    wants_scheduler = options.load_lr_scheduler_states and not options.load_module_only
    if wants_scheduler and engine.lr_scheduler is not None and saved.get("lr_scheduler") is None:
        raise CheckpointRefused(
            f"{model_path} has no state of a learning-rate scheduler and this run has one. Load it with "
            "load_lr_scheduler_states=False, or remove the scheduler"
        )
    steps = saved.get("global_steps")
    del saved
    if is_universal:
        _check_universal(engine, os.path.join(load_dir, tag, "zero"))
        return "true weights"
    if with_optimizer:
        return _check_shard(engine, load_dir, tag, steps)
    return "true weights"


def _read(engine, path) -> Mapping[str, Any]:
    try:
        _require_intact(path)
        content = engine.checkpoint_engine.load(path, map_location="cpu")
    except FileNotFoundError as cause:
        raise CheckpointRefused(
            f"{path} is missing: this is no complete checkpoint. Give the folder and tag of one{_others(path)}"
        ) from cause
    except CheckpointRefused:
        raise
    except Exception as cause:  # whatever unpickling meets in bytes that are not what was written
        raise CheckpointRefused(
            f"{path} cannot be read ({type(cause).__name__}: {cause}): it is truncated or no DeepSpeed checkpoint. "
            f"Load another one{_others(path)}"
        ) from cause
    if not isinstance(content, Mapping):
        raise CheckpointRefused(f"{path} holds a {type(content).__name__}: it is no DeepSpeed checkpoint")
    return content


def _require_intact(path) -> None:
    """Compares the file's content with the checksums that ``torch.save`` wrote beside it and ``torch.load`` ignores."""
    if not zipfile.is_zipfile(path):
        return  # what it is instead is seen by reading it
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged is not None:
        raise CheckpointRefused(
            f"{path} is damaged: the checksum of {damaged} is not that of its bytes. Load another one{_others(path)}"
        )


def _others(path) -> str:
    """Names the checkpoints beside the one that cannot be used."""
    folder, tag = os.path.split(os.path.dirname(path))
    if not os.path.isdir(folder):
        return f" ({folder} is no folder)"
    tags = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name != tag)
    return f" (there are: {', '.join(tags)})" if tags else ""


def _check_module(module: nn.Module, saved, options: LoadOptions, path) -> None:
    theirs = saved.get("module")
    if not isinstance(theirs, Mapping):
        raise CheckpointRefused(f'{path} has no key "module": it is no DeepSpeed checkpoint')
    if options.custom_load_fn is not None:
        return  # only that function knows what fits
    own = module.state_dict()
    if options.load_module_strict and not _renames_keys(module):
        missing, unexpected = [key for key in own if key not in theirs], [key for key in theirs if key not in own]
        if missing or unexpected:
            raise CheckpointRefused(
                f"{path} is of another model: it lacks {_some(missing)} and has in addition {_some(unexpected)}. Load "
                "a checkpoint of this model, or pass load_module_strict=False"
            )
    for key, tensor in own.items():
        other = theirs.get(key)
        if isinstance(tensor, Tensor) and isinstance(other, Tensor) and tensor.shape != other.shape:
            raise CheckpointRefused(
                f"{path} is of another model: {key} has the shape {tuple(other.shape)} there and "
                f"{tuple(tensor.shape)} here. Load a checkpoint of this model"
            )


def _renames_keys(module: nn.Module) -> bool:
    """Tells whether loading may accept other keys than state_dict() has."""
    return any(
        part._load_state_dict_pre_hooks or not type(part)._load_from_state_dict.__module__.startswith("torch.")
        for part in module.modules()
    )


def _some(names) -> str:
    listed = ", ".join(names[:3]) or "nothing"
    return f"{listed} and {len(names) - 3} more" if len(names) > 3 else listed


def _check_shard(engine, load_dir, tag, steps) -> str:
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
    saved = _read(engine, path).get("optimizer_state_dict")
    state: Mapping[str, Any] = saved if isinstance(saved, Mapping) else {}
    saved_masters, base = state.get("single_partition_of_fp32_groups"), state.get("base_optimizer_state")
    if saved_masters is None or base is None:
        raise CheckpointRefused(f"{path} was not saved by ZeRO stage 1 or 2. Load it with load_optimizer_states=False")
    if not isinstance(base, Mapping):
        raise CheckpointRefused(
            f"{path} was saved with zero_optimization.elastic_checkpoint = true; allowed: false. Load it with AdamW, "
            "save it again with false, or pass load_optimizer_states=False"
        )
    _check_origin(state.get(KEY), engine, steps, path)
    masters = optimizer.single_partition_of_fp32_groups
    if len(saved_masters) != len(masters):
        raise CheckpointRefused(
            f"{path} has {len(saved_masters)} parameter groups and this run has {len(masters)}. Build the optimizer "
            "with the same groups, or pass load_optimizer_states=False"
        )
    _check_placement(optimizer, state, saved_masters, path)
    _check_groups(base["param_groups"], path)
    for index, group in enumerate(base["param_groups"]):
        moments = base["state"].get(group["params"][0], {})
        if any(moment not in moments for moment in (*_MOMENTS, "step")):
            raise CheckpointRefused(
                f"{path} has no AdamW state (exp_avg, exp_avg_sq, step) for parameter group {index}. Load it with "
                "load_optimizer_states=False"
            )
    return _check_key(state.get(KEY), optimizer, path)


def _check_placement(optimizer, state, saved_masters, path) -> None:
    """Requires the same parameters at the same places of the shards; DeepSpeed itself moves them only where alignment
    of single parameters was added since (zero_optimization.parameter_alignment, not in older versions)."""
    alignment = getattr(optimizer, "round_robin_bit16_padding", [])
    if "param_alignment_paddings" not in state and any(any(paddings) for paddings in alignment):
        return
    own = [
        {name: (fragment.start, fragment.numel) for name, fragment in group.items()}
        for group in optimizer._param_slice_mappings
    ]
    theirs = [
        {name: (fragment.start, fragment.numel) for name, fragment in group.items()}
        for group in state.get("param_slice_mappings", [])
    ]
    if theirs and theirs != own:
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


def _check_groups(groups, path) -> None:
    for index, group in enumerate(groups):
        for flag, allowed in _GROUP_FLAGS.items():
            is_plain_adam = flag == "decoupled_weight_decay" and not group.get("weight_decay")
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
        raise CheckpointRefused(
            f"{path} was saved at step {state['global_steps']}, and the file with the module beside it at step "
            f"{steps}. Take all files of one checkpoint"
        )


def _check_key(state, optimizer, path) -> str:
    if state is None:
        return "true weights"
    if not isinstance(state, Mapping) or not isinstance(state.get("version"), int):
        raise CheckpointRefused(f'{path}: the key "{KEY}" is not what deepspeed_acco writes')
    if state["version"] > FORMAT:
        raise CheckpointRefused(
            f"{path} has format {state['version']} of deepspeed_acco; this version reads {FORMAT} and older ones. "
            "Install a newer deepspeed_acco, or pass load_optimizer_states=False"
        )
    fraction = state.get("estimate_fraction")
    if fraction is not None and not (isinstance(fraction, float) and 0 < fraction < 1):
        raise CheckpointRefused(f'{path}: estimate_fraction = {fraction!r} in "{KEY}" is no number between 0 and 1')
    resume, reason = from_state(state, optimizer.settings.schedule, optimizer.shard_numels())
    saved_by = f"run {state.get('run', 'unknown')}, estimate_fraction {fraction}"
    if resume is None:
        return f"{reason}, {saved_by}"
    return f"{len(resume.live)} {len(resume.predictions)} {state['window']}, {saved_by}"


def _check_universal(engine, folder) -> None:
    optimizer = engine.optimizer
    common = _read(engine, os.path.join(folder, "optimizer_state.pt"))
    groups = common.get("param_groups", [])
    if len(groups) != len(optimizer.bit16_groups):
        raise CheckpointRefused(
            f"{folder} has {len(groups)} parameter groups and this run has {len(optimizer.bit16_groups)}. Build the "
            "optimizer with the same groups"
        )
    _check_groups(groups, os.path.join(folder, "optimizer_state.pt"))
    for param in (param for group in optimizer.bit16_groups for param in group):
        if param._hp_mapping is None:
            continue  # other ranks have it
        for kind in ("fp32", *_MOMENTS):
            path = os.path.join(folder, optimizer.param_names[param], f"{kind}.pt")
            tensor = _read(engine, path).get("param")
            if not isinstance(tensor, Tensor) or tensor.numel() != param.numel():
                raise CheckpointRefused(
                    f"{path} is of another model: {tensor.numel() if isinstance(tensor, Tensor) else 'no'} elements "
                    f"where this run has {param.numel()}. Load a checkpoint of this model"
                )
