# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Checks every file of a checkpoint before anything of it is loaded.

A ZeRO-1 checkpoint (deepspeed/runtime/engine.py, ``save_checkpoint``) is one file with the module and one file per rank
with its shard of master weights and AdamW state. The weights of a PipelineModule are in one file per layer instead.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from .checkpoint_content import require
from .checkpoint_files import CheckpointRefused, read_mapping
from .checkpoint_layers import check_layers
from .checkpoint_model import LoadOptions, check_module, check_scheduler, needed_of_model
from .checkpoint_shards import check_shard, check_universal

_LONGEST_TAG = 1000  # letters


@dataclass(frozen=True)
class Finding:
    """Tells what one rank found out about a checkpoint; compared over the ranks before any of them loads."""

    tag: str | None  # None: there is no file that names the latest one
    stands_on: str  # which weights the resumed training would begin at
    problem: str  # empty: nothing


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
    with open(latest, encoding="utf-8", errors="replace") as file:
        named = file.read(_LONGEST_TAG + 1).strip()
    if not named:
        raise CheckpointRefused(f"{latest} is empty: its writer was stopped. Give tag= of a complete checkpoint")
    if len(named) > _LONGEST_TAG or "\ufffd" in named or not named.isprintable():
        raise CheckpointRefused(f"{latest} does not hold a tag: it is damaged. Give tag= of a complete checkpoint")
    return named


def _check_files(engine, load_dir, tag, options: LoadOptions) -> str:
    is_universal = engine.load_universal_checkpoint()
    model_path = engine._get_ckpt_name(load_dir, tag)
    saved = read_mapping(model_path)
    others = [path for path in engine._get_all_ckpt_names(load_dir, tag) if path != model_path]
    parts, parts_here = 1 + len(others), engine.mp_world_size
    if parts != parts_here and not is_universal:
        beside = f"beside {model_path} there is {others[0]}" if others else f"there is nothing beside {model_path}"
        raise CheckpointRefused(
            f"{beside}: it was saved with tensor parallelism, or is mixed up: it has {parts} parts of a model and this "
            f'run {parts_here}. Convert it with ds_to_universal.py and set "checkpoint": {{"load_universal": true}}'
        )
    for path in others:
        read_mapping(path)  # DeepSpeed reads them, too
    require(saved, needed_of_model(options), model_path)
    if not is_universal:
        if engine.pipeline_parallelism and saved.get("module") is None:
            check_layers(engine.module, os.path.join(load_dir, tag), options)
        else:
            check_module(engine.module, saved, options, model_path)
        here = engine.seq_dp_world_size
        if options.loads_optimizer and saved["dp_world_size"] != here:
            raise CheckpointRefused(
                f"it was saved by {saved['dp_world_size']} data-parallel ranks and this run has {here}. Convert it "
                'with ds_to_universal.py (--inject_missing_state) and set "checkpoint": {"load_universal": true}'
            )
        if options.loads_optimizer and saved.get("param_shapes") != engine._get_zero_param_shapes():
            raise CheckpointRefused(
                f"{model_path} has other param_shapes than this run: it is of another model, or was saved with other "
                "parameter groups. Load a checkpoint of this model, or pass load_optimizer_states=False"
            )
    if options.loads_scheduler and engine.lr_scheduler is not None:
        check_scheduler(engine.lr_scheduler, saved.get("lr_scheduler"), model_path)
    steps = saved.get("global_steps")
    del saved
    if is_universal:
        check_universal(engine, os.path.join(load_dir, tag, "zero"))
        return "true weights"
    if options.loads_optimizer:
        return check_shard(engine, load_dir, tag, steps)
    return "true weights"
