# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA kernels on the host, where there is no GPU: emulated, with sanitizers, with faults put into them."""
