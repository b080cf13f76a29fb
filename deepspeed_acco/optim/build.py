# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Builds and loads the kernels of csrc/ with torch.utils.cpp_extension.

setup.py loads this file by its path for the lists of sources and flags, so it imports neither torch nor the package at
its top.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
from pathlib import Path

NAME = "deepspeed_acco"
EXTENSION = "_native"  # in the package when it was built ahead of time
HOW_TO_BUILD = (
    "They are built at first use and need a C++ compiler and ninja (pip install ninja; on CUDA also the CUDA toolkit's "
    "nvcc), or ahead of time: DEEPSPEED_ACCO_BUILD_OPS=1 pip install --no-build-isolation . Run `ds_acco env` for what "
    "was found, and set DEEPSPEED_ACCO_KERNELS=torch to use the PyTorch path without this warning"
)
_PACKAGE = Path(__file__).resolve().parents[1]

loaded_from = ""  # where the library that this process loaded lies


def csrc() -> Path:
    """Returns the folder of the sources: inside an installed package, beside the package in a checkout.

    Raises:
        RuntimeError: in neither place.
    """
    folders = (_PACKAGE / "csrc", _PACKAGE.parent / "csrc")
    for folder in folders:
        if (folder / "common" / "registration.cpp").is_file():
            return folder
    raise RuntimeError(f"ACCO: the kernels' sources were not found in {' nor in '.join(map(str, folders))}")


def sources(with_cuda: bool) -> list[Path]:
    """Returns the source files to compile, with or without those of CUDA."""
    names = ["cpu/all.cpp"]
    if with_cuda:
        names += ["cuda/adamw_cuda.cpp", "cuda/adamw.cu", "cuda/quantize_cuda.cpp", "cuda/quantize.cu"]
        names += ["cuda/local_prediction_cuda.cpp", "cuda/local_prediction.cu"]
        names += ["cuda/shards_cuda.cpp", "cuda/shards.cu"]
    return [csrc() / name for name in names]


def cxx_args(architecture: str = "-march=native") -> list[str]:
    """Returns the C++ compiler's flags. The numerical ones are part of the result: without contraction an element has
    the same bits in a vector body and in a scalar tail; a square root that sets no errno can be vectorized."""
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
    """Returns nvcc's flags; torch adds the architectures, of ``TORCH_CUDA_ARCH_LIST`` or the visible devices."""
    return ["-O3", "-std=c++17", "-fmad=false", "--expt-relaxed-constexpr"]


def ld_args() -> list[str]:
    """Returns the linker's flags."""
    return ["-fopenmp"]


def _torch_version() -> tuple[int, int]:
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def mark(with_cuda: bool) -> str:
    """Returns what a library that is built ahead has in it: of which sources it is, and whether for CUDA."""
    return f"{NAME}_{_sources_digest()}_{'cuda' if with_cuda else 'cpu'}"


def choose_architectures() -> None:
    """Chooses ``TORCH_CUDA_ARCH_LIST`` for a build ahead where nobody did and no device is visible, as on the machine
    that builds an image: Ampere, Hopper and Blackwell, and PTX for what comes later."""
    import torch

    if torch.version.cuda is not None and not torch.cuda.is_available():
        major, minor = (int(number) for number in torch.version.cuda.split(".")[:2])
        has_blackwell = (major, minor) >= (12, 8)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX" if has_blackwell else "8.0;9.0+PTX")


def cuda_is_buildable() -> tuple[bool, str]:
    """Tells whether the CUDA kernels can be built here, and why not (empty where they can)."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.hip is not None:
        return False, "this PyTorch is for ROCm, for which there are no kernels"
    if torch.version.cuda is None:
        return False, "this PyTorch was built without CUDA"
    if not torch.cuda.is_available() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return False, "no CUDA device is visible and TORCH_CUDA_ARCH_LIST is not set"
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").is_file():
        return False, "nvcc was not found (CUDA_HOME)"
    return True, ""


def cpu_architecture() -> str:
    """Returns the flag for this machine's own instructions, as DeepSpeed's op_builder/builder.py chooses it."""
    return "-mcpu=native" if platform.machine().startswith("ppc") else "-march=native"


def load(device_type: str = "cpu") -> str:
    """Loads the kernels, building them when needed (once per machine and version; the result is cached).

    Args:
        device_type: ``cuda`` takes no library that has none for it. A process loads one library.

    Returns:
        Where the library lies.

    Raises:
        RuntimeError, OSError: why it cannot be had; with the compiler's output when that failed.
    """
    global loaded_from
    path, passed_over = _load_built_ahead(device_type)
    if not path:
        is_buildable, why_not = cuda_is_buildable()
        if device_type == "cuda" and not is_buildable:
            raise RuntimeError("; ".join([why_not, *passed_over]))
        path = _build_and_load()
    loaded_from = path
    return path


def _load_built_ahead(device_type: str) -> tuple[str, list[str]]:
    """Loads the library that was built at install, and returns where it lies, empty where there is none for this device
    and PyTorch, and why others were passed over."""
    import torch

    passed_over = []
    for built in sorted(_PACKAGE.glob(f"{EXTENSION}*.so")):
        content = built.read_bytes()
        has_cuda = mark(with_cuda=True).encode() in content
        if not has_cuda and mark(with_cuda=False).encode() not in content:
            passed_over.append(f"{built} was built ahead of other sources")
        elif device_type == "cuda" and not has_cuda:
            passed_over.append(f"{built} was built ahead without CUDA kernels")
        else:
            try:
                torch.ops.load_library(str(built))
                return str(built), passed_over
            except OSError as error:  # made for another PyTorch: build again
                passed_over.append(f"{built} cannot be loaded: {error}")
    return "", passed_over


def _build_and_load() -> str:
    import torch
    from filelock import FileLock

    from .build_folder import say, trusted_folder, why_not_loadable

    with_cuda = cuda_is_buildable()[0]
    folder = trusted_folder(build_name(with_cuda))
    library = folder / f"{NAME}.so"
    reason = why_not_loadable(library)
    if reason:
        _require_compiler()
        duration = "some minutes" if with_cuda else "about half a minute"
        say(f"the native kernels are built once, in {duration}, into {folder} ({reason})")
        with FileLock(folder / "owner"):  # unlike torch's, it ends with its owner
            if why_not_loadable(library):
                _build(folder / "building", library, with_cuda)
                return str(library)
    torch.ops.load_library(str(library))
    return str(library)


def _require_compiler() -> None:
    from torch.utils.cpp_extension import verify_ninja_availability

    if shutil.which(compiler()) is None:
        raise RuntimeError(f"no C++ compiler: {compiler()!r} (CXX) was not found")
    verify_ninja_availability()


def _build(folder: Path, library: Path, with_cuda: bool) -> None:
    """Builds in a folder that is new and goes again, loads, and puts the library in its place. A library is never
    written where others load it; what a killed build left behind, torch's lock among it, goes first."""
    from torch.utils.cpp_extension import load

    from .build_folder import put

    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(mode=0o700)
    # The library registers its operators with the dispatcher and has no Python module in it.
    built = load(
        name=NAME,
        sources=[str(path) for path in sources(with_cuda)],
        extra_include_paths=[str(csrc())],
        extra_cflags=cxx_args(cpu_architecture()),
        extra_cuda_cflags=nvcc_args() if with_cuda else [],
        extra_ldflags=ld_args(),
        build_directory=str(folder),
        with_cuda=with_cuda,
        is_python_module=False,
    )
    put(Path(built), library)
    shutil.rmtree(folder)


def compiler() -> str:
    """Returns the C++ compiler that torch calls."""
    return os.environ.get("CXX", "c++").split()[0]


def build_name(with_cuda: bool) -> str:
    """Returns the name of the folder that this build is cached in. A cache may lie in a home that machines with other
    CPUs, environments or checkouts share, so the name has a hash of everything that the library depends on."""
    import torch

    parts = [torch.__version__, str(torch.version.cuda), os.environ.get("TORCH_CUDA_ARCH_LIST", ""), compiler()]
    parts += [*cxx_args(cpu_architecture()), *(nvcc_args() if with_cuda else []), _cpu_features()]
    if with_cuda and torch.cuda.is_available():
        parts += sorted({str(torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())})
    return f"{NAME}_{_digest([*parts, _sources_digest()])}"


def _sources_digest() -> str:
    parts = []
    for path in sorted(csrc().rglob("*")):
        if path.is_file():
            parts += [str(path.relative_to(csrc())), hashlib.sha256(path.read_bytes()).hexdigest()]
    return _digest(parts)


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _cpu_features() -> str:
    """Returns what ``-march=native`` means here: the CPU's features, or its name where they are not told."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return f"{platform.machine()} {platform.processor()}"
