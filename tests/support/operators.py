# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Builds what most of the tests need, into the folder that they share: ``python -m tests.support.operators``.

Whoever needs one before it is there waits for it, or builds it.
"""

from deepspeed.comm.torch import build_shm_op

from deepspeed_acco.optim import build

if __name__ == "__main__":
    build.load()
    build_shm_op()  # DeepSpeed's communication between the ranks of a host of CPUs
