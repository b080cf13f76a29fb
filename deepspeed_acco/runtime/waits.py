# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Bounds what collectives on process groups of others may wait, where they come on DeepSpeed's way through a step or a
checkpoint: by default that is half an hour."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch


def _backends(group) -> list:
    """Returns those whose timeout can be set: gloo and NCCL. With any other, and inside the checks that torch puts
    around a group with TORCH_DISTRIBUTED_DEBUG=DETAIL, the group's own timeout holds."""
    backends = [group._get_backend(torch.device(device)) for device in group._device_types]
    return [backend for backend in backends if hasattr(backend, "_set_default_timeout")]


@contextmanager
def at_most(timeout_s: float, groups: Iterable) -> Iterator[None]:
    """Lets collectives that begin inside the block, on any of these process groups, wait so many seconds for a rank
    that does not come; afterwards the groups have their own timeouts again.

    Source: ``_set_pg_timeout`` of torch/distributed/distributed_c10d.py, for gloo and NCCL.
    """
    own = {backend: backend.options._timeout for group in groups for backend in _backends(group)}
    for backend in own:
        backend._set_default_timeout(timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        for backend, timeout in own.items():
            backend._set_default_timeout(timeout)
