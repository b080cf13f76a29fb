# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The fuzzer of checkpoints, with a few hundred inputs: ``python -m tests.fuzz checkpoints`` tries more, other ones."""

from tests.fuzz import checkpoints


def _findings(seed, count):
    return list(checkpoints.run(seed, count))


def test_checkpoints(ranks):
    assert ranks(1).run(_findings, seed=1, count=125) == [[]]
