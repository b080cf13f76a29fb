# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Checks the files with the weights of a PipelineModule, which has one for each layer and none with the whole module
(deepspeed/runtime/pipe/module.py, ``save_state_dict``), and completes what was loaded of them."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from .checkpoint_files import CheckpointRefused, read_mapping
from .checkpoint_model import LoadOptions, check_weights
from .deepspeed_engine import Engine


def check_layers(module: Any, folder: str, options: LoadOptions) -> None:
    """Requires the weights of every layer of a PipelineModule, all finite."""
    for index, layer in enumerate(module.forward_funcs):
        if isinstance(layer, nn.Module):  # and no function, of which there is no file
            path = _path_of(module, folder, index)
            check_weights(layer, read_mapping(path), options, path)


def _path_of(module: Any, folder: str, index: int) -> str:
    """Returns the file that DeepSpeed would load the layer from, be it missing."""
    path, *others = module.ckpt_layer_path_list(folder, index) or [module.ckpt_layer_path(folder, index)]
    if others:
        raise CheckpointRefused(
            f"beside {path} there is {others[0]}: it was saved with tensor parallelism, or is mixed up. Load a "
            "checkpoint that was saved without"
        )
    return path


def fill_unsaved(engine: Engine, has_masters: bool) -> None:
    """Makes all weights from the masters where some are in no file: those of tied layers that ``forward_fn`` alone
    calls, or of a loss with parameters. ZeRO-1 would train the first window after a load at the values that such
    weights had before; every rank must call it.

    Args:
        has_masters: they were loaded.
    """
    if not (has_masters and engine.pipeline_parallelism):
        return
    layers: Any = engine.module.forward_funcs
    saved = {id(param) for layer in layers if isinstance(layer, nn.Module) for param in layer.parameters()}
    if any(param.requires_grad and id(param) not in saved for param in engine.module.parameters()):
        DeepSpeedZeroOptimizer.update_lp_params(engine.optimizer)
