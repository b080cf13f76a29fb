# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The fuzzer of checkpoints, with a few hundred inputs: ``python -m tests.fuzz checkpoints`` tries more, other ones."""

import pytest

from tests.fuzz import checkpoints


def _findings(seed, count):
    return list(checkpoints.run(seed, count))


@pytest.mark.parametrize("count", [125, pytest.param(250, marks=pytest.mark.full)])
def test_checkpoints(ranks, count):
    assert ranks(1).run(_findings, seed=1, count=count) == [[]]
