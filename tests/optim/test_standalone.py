# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""What is proven without torch: the sanitizers, the index arithmetic, and that the CUDA sources compile."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from deepspeed_acco.optim import build as op_builder
from tests.support import sanitize

pytestmark = pytest.mark.native
NVCC = shutil.which("nvcc") or shutil.which(str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"))
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")


@pytest.mark.full
def test_address_and_undefined_behavior():
    assert sanitize.sanitize() == "sanitize: ok\n"


def test_indices_beyond_32_bits():
    assert sanitize.build_and_run(sanitize.HERE / "indices.cpp", ["-O2", "-fsanitize=undefined"]) == "indices: ok\n"


def test_levels_without_a_division():
    numeric = ["-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    assert sanitize.build_and_run(sanitize.HERE / "levels.cpp", numeric) == "levels: ok\n"


@needs_nvcc
@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                *(("adamw", "sm_80"), ("quantize", "sm_90"), ("adamw", "sm_90"), ("quantize", "sm_80")),
                *(("local_prediction", "sm_80"), ("local_prediction", "sm_90")),
            )
        ),
    ],
)
def test_cuda_kernels_compile(tmp_path, name, architecture):
    source = op_builder.csrc() / "cuda" / f"{name}.cu"
    command = [NVCC, *op_builder.nvcc_args(), f"-arch={architecture}", "-Werror", "all-warnings"]
    command += [f"-I{op_builder.csrc()}", "-c", str(source), "-o", str(tmp_path / f"{name}.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_nvcc
@pytest.mark.full
def test_cuda_ops_are_valid_cpp(tmp_path):
    """The torch side; the CPU build of torch lacks one generated header of macros, for which an empty one stands in.
    All files as one, since reading torch's headers takes most of the time."""
    from torch.utils.cpp_extension import include_paths

    macros = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    macros.parent.mkdir(parents=True)
    macros.write_text("#pragma once\n")
    toolkit = Path(NVCC).resolve().parents[1]
    roots = [toolkit, Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    headers = [h for root in roots for h in (root / "include", root / "targets/x86_64-linux/include")]
    folders = [
        op_builder.csrc(),
        *include_paths(),
        *(h for h in headers if (h / "cuda_runtime_api.h").is_file()),
        tmp_path,
    ]
    standard = [flag for flag in op_builder.cxx_args() if flag.startswith("-std")]
    command = ["c++", "-fsyntax-only", *standard, *(f"-I{folder}" for folder in folders)]
    both = tmp_path / "both.cpp"
    names = ("adamw_cuda.cpp", "quantize_cuda.cpp", "local_prediction_cuda.cpp")
    both.write_text("".join(f'#include "cuda/{name}"\n' for name in names))
    done = subprocess.run([*command, str(both)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
