# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Reads the files of a checkpoint without running what stands in them: pickles may name any function."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from deepspeed.checkpoint import SubparamShape
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import serialization

_OF_PYTHON = [Counter, complex, set]  # which older versions of torch do not all take
# What DeepSpeed's own checkpoints hold beside torch's plain data; none of it does anything when it is made.
_OF_DEEPSPEED = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, SubparamShape]
# Random states (of DeepSpeed's data sampler, and in many a client_state) and NumPy's numbers: arrays of numbers only.
_OF_NUMPY = [
    numpy.ndarray,
    numpy.dtype,
    numpy.zeros(0).__reduce__()[0],
    numpy.float64(0).__reduce__()[0],
    *{type(numpy.dtype(code)) for code in "?bhilqBHILQefd"},
]


def _member(kind: Any, name: str) -> Any:
    """Returns a member of an enumeration: all that ``getattr`` is let do. Python before 3.11.4 pickles members so."""
    if kind is not ZeroStageEnum:
        raise pickle.UnpicklingError(f"GLOBAL getattr was not an allowed function for {kind!r}")
    return ZeroStageEnum[name]


_member.__module__, _member.__qualname__ = "builtins", "getattr"  # by which torch finds it

_NOT_PLAIN = re.compile(r"GLOBAL (\S+) (was not an allowed|whose module)")
_UNPICKLER_ERROR = re.compile(r"WeightsUnpickler error:\s*(.+)")


class CheckpointRefused(ValueError):
    """Says that a checkpoint was not loaded; the run in memory is what it was before."""


def read(path: str) -> Any:
    """Returns what a file of a checkpoint holds, on the CPU.

    Raises:
        CheckpointRefused: the file is missing, damaged, or names what is neither plain data nor allowed by
            ``torch.serialization.add_safe_globals``.
    """
    # Those that the user has added stay: leaving the context would remove them, too.
    known = [*_OF_PYTHON, *_OF_DEEPSPEED, *_OF_NUMPY, _member]
    added = [each for each in known if each not in serialization.get_safe_globals()]
    try:
        _require_intact(path)
        with serialization.safe_globals(added):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as cause:
        raise CheckpointRefused(
            f"{path} is missing: this is no complete checkpoint. Give the folder and tag of one{_others(path)}"
        ) from cause
    except CheckpointRefused:
        raise
    except Exception as cause:  # whatever unpickling meets in bytes that are not what was written
        raise CheckpointRefused(f"{path} {_why_unreadable(cause)}{_others(path)}") from cause


def _why_unreadable(cause: Exception) -> str:
    named = _NOT_PLAIN.search(str(cause)) if isinstance(cause, pickle.UnpicklingError) else None
    if named is None:
        told = _UNPICKLER_ERROR.search(str(cause))
        reason = told[1] if told else (str(cause).splitlines() or [""])[0]
        return (
            f"cannot be read ({type(cause).__name__}: {reason}): it is truncated or no DeepSpeed checkpoint. Load "
            "another one"
        )
    can_be_allowed = named[2].startswith("was")
    allow = (
        "If you trust the file (a client_state may hold such an object), import that name and pass it to "
        "torch.serialization.add_safe_globals([...]) before you load; or load another checkpoint"
    )
    return (
        f"names {named[1]}, which is no plain data: reading it may run code. "
        f"{allow if can_be_allowed else 'Load another checkpoint'}"
    )


def read_mapping(path: str) -> Mapping[str, Any]:
    """Does the same where a dictionary is expected."""
    content = read(path)
    if not isinstance(content, Mapping):
        raise CheckpointRefused(f"{path} holds a {type(content).__name__}: it is no DeepSpeed checkpoint")
    return content


def _require_intact(path: str) -> None:
    """Compares the file's content with the checksums that ``torch.save`` wrote beside it and ``torch.load`` ignores."""
    if not zipfile.is_zipfile(path):
        return  # what it is instead is seen by reading it
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged is not None:
        raise CheckpointRefused(
            f"{path} is damaged: the checksum of {damaged} is not that of its bytes. Load another one{_others(path)}"
        )


def _others(path: str) -> str:
    """Names the checkpoints beside the one that cannot be used."""
    folder, tag = os.path.split(os.path.dirname(path))
    if not os.path.isdir(folder):
        return f" ({folder} is no folder)"
    tags = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name != tag)
    return f" (there are: {', '.join(tags)})" if tags else ""
