# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""The machine in one string."""

import os
import subprocess
import sys

import torch

from deepspeed_acco.tools.machine import describe_machine


def test_the_machine_in_one_string():
    cores, *processor, python, pytorch = describe_machine().split(", ")
    assert cores == f"{os.cpu_count()} cores"
    assert "".join(processor).strip()
    said = subprocess.run([sys.executable, "--version"], capture_output=True, text=True).stdout
    assert python == said.strip()
    assert pytorch.startswith("torch ")
    assert torch.__version__.startswith(pytorch.removeprefix("torch "))  # which may name the build, too
