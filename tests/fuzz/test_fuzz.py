# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The fuzzers, with a few hundred inputs each: ``python -m tests.fuzz NAME`` tries more, and other ones."""

from tests.fuzz.__main__ import findings


def test_command_lines():
    assert not list(findings("command_lines", seed=1, count=150))


def test_results():
    assert not list(findings("results", seed=1, count=75))
