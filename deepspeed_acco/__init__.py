# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""ACCO for DeepSpeed: ZeRO-1 whose communication runs behind the computation of the next gradients.

Importing this package registers the optimizer type ``ACCO`` with DeepSpeed and has no other effect.
"""

__version__ = "0.1.0"

try:
    import deepspeed as _deepspeed  # noqa: F401
except ImportError as cause:
    raise ImportError(
        "deepspeed_acco is a plugin of DeepSpeed, which could not be imported. Install it after PyTorch: "
        "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"
    ) from cause

from .engine.adaptive_windows import WindowCounts, on_window, replay_windows, train_samples
from .engine.patches import register as _register
from .engine.true_weights import true_weights
from .optimizer import ACCO

__all__ = ["ACCO", "WindowCounts", "__version__", "on_window", "replay_windows", "train_samples", "true_weights"]

_register()
