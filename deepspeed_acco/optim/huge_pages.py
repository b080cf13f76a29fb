# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Asks for large memory pages under the flat buffers on a CPU.

The updates walk through several long arrays at once, and with 4 KiB pages a good part of their time goes into finding
the pages. Linux gives 2 MiB pages to memory that asks for them (madvise(2), "Transparent Hugepage Support").
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

from torch import Tensor

PAGE_BYTES = 2**21
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # linux/mman.h; the second one since Linux 6.1: also for pages in use


def use_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Asks for 2 MiB pages under the tensors, and that what they hold is moved there. The values stay.

    It is advice: a system without such pages, or with none to spare, keeps the pages that it has.

    Args:
        tensors: contiguous ones of any dtype; those on other devices and those below 2 MiB are left alone.

    Returns:
        The bytes for which the system took the advice.
    """
    if not sys.platform.startswith("linux"):
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    taken = 0
    for tensor in tensors:
        if tensor.device.type != "cpu":
            continue
        begin = -(-tensor.data_ptr() // PAGE_BYTES) * PAGE_BYTES
        length = (tensor.data_ptr() + tensor.nbytes) // PAGE_BYTES * PAGE_BYTES - begin
        if length > 0 and madvise(begin, length, _MADV_HUGEPAGE) == 0:
            madvise(begin, length, _MADV_COLLAPSE)
            taken += length
    return taken
