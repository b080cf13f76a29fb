# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Large pages change where values lie, never the values; the kernel itself is asked whether it took the advice."""

import sys
from pathlib import Path

import pytest
import torch

from deepspeed_acco.optim.huge_pages import PAGE_BYTES, use_huge_pages

FLAG = "hg"  # of a mapping in /proc/self/smaps: madvise(MADV_HUGEPAGE) was called on it


def _advised_bytes(begin, end):
    """Bytes of [begin, end) in mappings that carry the flag."""
    total, mapping = 0, (0, 0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            mapping = tuple(int(address, 16) for address in head.split("-"))
        elif head == "VmFlags:" and FLAG in line.split():
            total += max(0, min(end, mapping[1]) - max(begin, mapping[0]))
    return total


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").is_file() or sys.platform != "linux",
    reason="this system has no transparent huge pages",
)
@pytest.mark.parametrize("numel", [PAGE_BYTES, 5 * PAGE_BYTES + 77])
def test_the_pages_inside_are_advised_and_the_values_stay(numel):
    values = torch.arange(numel, dtype=torch.int32)
    taken = use_huge_pages([values])
    assert values.nbytes - 2 * PAGE_BYTES < taken <= values.nbytes and taken % PAGE_BYTES == 0
    inside = values.data_ptr() + -values.data_ptr() % PAGE_BYTES
    assert _advised_bytes(inside, inside + taken) == taken
    assert values.equal(torch.arange(numel, dtype=torch.int32))


def test_what_has_no_whole_page_is_left_alone():
    assert use_huge_pages([torch.zeros(1000), torch.zeros(0), torch.zeros(PAGE_BYTES, device="meta")]) == 0
