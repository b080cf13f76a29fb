# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The smallest example as its docstring says it, but for the launcher, which starts it in ``full`` runs."""

import re

import pytest

from tests.support.launcher import ROOT, launch
from tests.support.ranks import run_script


@pytest.mark.distributed
@pytest.mark.timeout(400)
@pytest.mark.parametrize("start", [run_script, pytest.param(launch, marks=pytest.mark.full)])
def test_the_smallest_script_learns(start):
    script = ROOT / "examples" / "minimal.py"
    assert len(script.read_text().splitlines()) < 50
    done = start(script)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    losses = {
        int(step): float(loss) for step, loss in re.findall(r"^step (\d+) loss (\S+)$", done.stdout, re.MULTILINE)
    }
    assert list(losses) == [10, 20, 30, 40, 50]
    assert losses[50] < 0.5 * losses[10]
