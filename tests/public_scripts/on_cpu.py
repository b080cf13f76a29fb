# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Runs a script of Accelerate's on CPU ranks: ``python -m tests.public_scripts.on_cpu SCRIPT ARGUMENTS``.

Without a GPU Accelerate takes every rank of DeepSpeed's for the only one, unless its state is made before.
"""

import runpy
import sys

from accelerate import PartialState

if __name__ == "__main__":
    PartialState(cpu=True)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
