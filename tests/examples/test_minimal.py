# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The smallest example as a user starts it."""

import re

import pytest

from tests.support.launcher import ROOT, launch


@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_the_smallest_script_learns():
    script = ROOT / "examples" / "minimal.py"
    assert len(script.read_text().splitlines()) < 50
    done = launch(script)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    losses = {
        int(step): float(loss) for step, loss in re.findall(r"^step (\d+) loss (\S+)$", done.stdout, re.MULTILINE)
    }
    assert list(losses) == [10, 20, 30, 40, 50]
    assert losses[50] < 0.5 * losses[10]
