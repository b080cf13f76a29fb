# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Builds and loads the kernels of csrc/ through DeepSpeed's op-builder convention.

setup.py loads this file by its path for the lists of sources and flags, so it imports neither DeepSpeed nor the package
at its top.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

NAME = "deepspeed_acco"
EXTENSION = "_native"  # beside this file when it was built ahead of time
HOW_TO_BUILD = (
    "They are built at first use and need a C++ compiler and ninja (pip install ninja; on CUDA also the CUDA toolkit's "
    "nvcc), or ahead of time: DEEPSPEED_ACCO_BUILD_OPS=1 pip install --no-build-isolation . Run `ds_acco env` for what "
    "was found, and set DEEPSPEED_ACCO_KERNELS=torch to use the PyTorch path without this warning"
)
_HERE = Path(__file__).resolve().parent

loaded_from = ""  # where the library that this process loaded lies


def csrc() -> Path:
    """The folder of the sources: inside an installed package, beside the package in a checkout."""
    for folder in (_HERE / "csrc", _HERE.parent / "csrc"):
        if (folder / "registration.cpp").is_file():
            return folder
    raise RuntimeError(f"ACCO: the kernels' sources were not found in {_HERE / 'csrc'} nor in {_HERE.parent / 'csrc'}")


def sources(with_cuda: bool) -> list[Path]:
    names = ["registration.cpp", "adamw_cpu.cpp", "quantize_cpu.cpp"]
    if with_cuda:
        names += ["cuda/adamw_cuda.cpp", "cuda/adamw.cu", "cuda/quantize_cuda.cpp", "cuda/quantize.cu"]
    return [csrc() / name for name in names]


def cxx_args(architecture: str = "-march=native") -> list[str]:
    """Compiler flags. The numerical ones are part of the result: without contraction an element has the same bits in a
    vector body and in a scalar tail; a square root that sets no errno can be vectorised."""
    return [
        "-O3",
        "-std=c++20" if _torch_version() >= (2, 12) else "-std=c++17",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fopenmp",
        *([architecture] if architecture else []),
    ]


def nvcc_args() -> list[str]:
    """As :func:`cxx_args`; the architectures come from ``TORCH_CUDA_ARCH_LIST`` or the visible devices, by torch."""
    return ["-O3", "-std=c++17", "-fmad=false", "--expt-relaxed-constexpr"]


def ld_args() -> list[str]:
    return ["-fopenmp"]


def _torch_version() -> tuple[int, int]:
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def cuda_is_buildable() -> tuple[bool, str]:
    """Whether the CUDA kernels can be built here, and why not."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return False, "this PyTorch was built without CUDA"
    if not torch.cuda.is_available() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return False, "no CUDA device is visible and TORCH_CUDA_ARCH_LIST is not set"
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").is_file():
        return False, "nvcc was not found (CUDA_HOME)"
    return True, ""


@functools.cache
def builder_class() -> type:
    """The op builder, a subclass of DeepSpeed's."""
    from deepspeed.ops.op_builder.builder import CUDAOpBuilder

    class AccoBuilder(CUDAOpBuilder):
        BUILD_VAR = "DEEPSPEED_ACCO_BUILD_OPS"
        NAME = NAME

        def __init__(self):
            super().__init__(name=self.NAME)
            self.build_for_cpu = not cuda_is_buildable()[0]
            self._cxx_args = None

        def absolute_name(self):
            return f"deepspeed_acco.{EXTENSION}"

        def is_compatible(self, verbose=False):
            return shutil.which(compiler()) is not None

        def sources(self):
            return [str(path) for path in sources(with_cuda=not self.build_for_cpu)]

        def include_paths(self):
            return [str(csrc())]

        def cxx_args(self):
            if self._cxx_args is None:  # asking for the CPU takes a second
                self._cxx_args = cxx_args(self.cpu_arch())
            return self._cxx_args

        def nvcc_args(self):
            # Not DeepSpeed's: those contain --use_fast_math.
            return [] if self.build_for_cpu else nvcc_args()

        def extra_ldflags(self):
            return ld_args()

        def libraries_args(self):
            return []

        def load(self, verbose=False):
            """Loads the library that was built ahead of time, or builds it. Returns where it lies."""
            for built in sorted(_HERE.glob(f"{EXTENSION}*.so")):
                with contextlib.suppress(OSError):  # made for another PyTorch: build again
                    import torch

                    torch.ops.load_library(str(built))
                    return str(built)
            return self.jit_load(verbose)

        def jit_load(self, verbose=False):
            # Not DeepSpeed's: the library registers its operators with the dispatcher and has no Python module in it.
            from torch.utils.cpp_extension import load, verify_ninja_availability

            if not self.is_compatible(verbose):
                raise RuntimeError(f"no C++ compiler: {compiler()!r} (CXX) was not found")
            verify_ninja_availability()
            folder = build_directory(self)
            with _exclusive(folder):
                return load(
                    name=self.NAME,
                    sources=self.sources(),
                    extra_include_paths=self.include_paths(),
                    extra_cflags=self.cxx_args(),
                    extra_cuda_cflags=self.nvcc_args(),
                    extra_ldflags=self.extra_ldflags(),
                    build_directory=str(folder),
                    with_cuda=not self.build_for_cpu,
                    is_python_module=False,
                    verbose=verbose,
                )

    return AccoBuilder


def load() -> str:
    """Loads the kernels, building them when needed (once per machine and version; the result is cached).

    Returns:
        Where the library lies.

    Raises:
        RuntimeError, OSError: why it cannot be had; with the compiler's output when that failed.
    """
    global loaded_from
    loaded_from = builder_class()().load()
    return loaded_from


def compiler() -> str:
    """The C++ compiler that torch calls."""
    return os.environ.get("CXX", "c++").split()[0]


def build_directory(builder) -> Path:
    """Where this build is cached. A cache may lie in a home that machines with other CPUs or environments share, so the
    name has a hash of everything that the library depends on."""
    import torch

    parts = [torch.__version__, str(torch.version.cuda), os.environ.get("TORCH_CUDA_ARCH_LIST", ""), compiler()]
    parts += [*builder.cxx_args(), *builder.nvcc_args(), _cpu_features()]
    if not builder.build_for_cpu and torch.cuda.is_available():
        parts += sorted({str(torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())})
    for path in sorted(csrc().rglob("*")):
        if path.is_file():
            parts.append(hashlib.sha256(path.read_bytes()).hexdigest())
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(os.path.expanduser("~"), ".cache", "torch_extensions")
    return Path(root) / f"{NAME}_{digest}"


def _cpu_features() -> str:
    """What ``-march=native`` means here."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["uname", "-mp"], capture_output=True, text=True, check=True).stdout
    return ""


@contextlib.contextmanager
def _exclusive(folder: Path):
    """One process at a time. torch's own lock is a file that a killed build leaves behind, and everybody waits for it
    for ever after; this one ends with its owner, who may therefore remove torch's."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "owner", "w") as owner:
        with contextlib.suppress(OSError):  # a file system without locks: torch's lock alone
            fcntl.flock(owner, fcntl.LOCK_EX)
            (folder / "lock").unlink(missing_ok=True)
        yield
