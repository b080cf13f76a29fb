# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The fuzzers, with a few hundred inputs each: ``python -m tests.fuzz NAME`` tries more, and other ones."""

import pytest

from tests.fuzz.__main__ import findings


@pytest.mark.parametrize("count", [150, pytest.param(300, marks=pytest.mark.full)])
def test_command_lines(count):
    assert not list(findings("command_lines", seed=1, count=count))


@pytest.mark.parametrize("count", [75, pytest.param(150, marks=pytest.mark.full)])
def test_results(count):
    assert not list(findings("results", seed=1, count=count))
