# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Brings ACCO to DeepSpeed: ZeRO-1 whose communication runs behind the computation of the next gradients.

Importing this package registers the optimizer type ``ACCO`` with DeepSpeed and has no other effect. The command
``ds_acco`` trains nothing and answers without PyTorch and DeepSpeed; there the first use of a public name registers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.adaptive_windows import WindowCounts, on_window, replay_windows, train_samples
    from .engine.true_weights import true_weights
    from .optimizer import ACCO

__version__ = "0.1.0"
__all__ = ["ACCO", "WindowCounts", "__version__", "on_window", "replay_windows", "train_samples", "true_weights"]

_MODULE_OF = {
    "ACCO": ".optimizer",
    "WindowCounts": ".engine.adaptive_windows",
    "on_window": ".engine.adaptive_windows",
    "replay_windows": ".engine.adaptive_windows",
    "train_samples": ".engine.adaptive_windows",
    "true_weights": ".engine.true_weights",
}


def _is_command() -> bool:
    """Tells whether this process is the command ``ds_acco``: by the name of the program, or by the module's name behind
    ``python -m``, which ``sys.argv`` does not have yet while packages are imported on the way to it."""
    if sys.argv[:1] == ["-m"]:
        return sys.orig_argv[-len(sys.argv)] == "deepspeed_acco.tools.cli"
    return bool(sys.argv) and Path(sys.argv[0]).name in ("ds_acco", "ds_acco.exe")


def _register() -> None:
    """Registers with DeepSpeed and imports the public names.

    Raises:
        ImportError: without DeepSpeed, or with one that is not supported.
    """
    try:
        import deepspeed  # noqa: F401
    except ImportError as cause:
        raise ImportError(
            "deepspeed_acco is a plugin of DeepSpeed, which could not be imported. Install it after PyTorch: "
            "DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"
        ) from cause
    from .engine.patches import register

    for name, module in _MODULE_OF.items():
        globals()[name] = getattr(import_module(module, __name__), name)
    register()


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _register()
    return globals()[name]


if not _is_command():
    _register()
