# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""Compiles the files of csrc/cuda for the host: as a program with sanitizers, and as a library for PyTorch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from deepspeed_acco.optim import build
from tests.cuda_on_cpu.faults import Fault

HERE = Path(__file__).resolve().parent
HEADERS = ("cuda_runtime_api.h", "cuda_bf16.h", "cuda_fp16.h")
# Of "undefined" what a kernel may do wrong; all of it takes half as long again to compile.
_SANITIZERS = (
    "-fsanitize=address,alignment,bool,bounds,shift,signed-integer-overflow",
    "-fno-sanitize-recover=all",
)
_LAUNCH = re.compile(r"(\w+(?:<[^;{}]*?>)?)<<<(.*?)>>>\(", re.DOTALL)


def toolkit() -> Path | None:
    """Returns the folder of the CUDA toolkit's headers; None where they are not."""
    nvcc = shutil.which("nvcc")
    roots = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), *([Path(nvcc).resolve().parents[1]] if nvcc else [])]
    folders = [folder for root in roots for folder in (root / "include", *root.glob("targets/*/include"))]
    return next((folder for folder in folders if all((folder / name).is_file() for name in HEADERS)), None)


def translated(source: str) -> str:
    """Returns the source with CUDA's ``kernel<T><<<blocks, ...>>>(`` as calls of ``emulation::launch``."""
    text, count = _LAUNCH.subn(
        r'::emulation::launch("\1", \2, [&](const auto&... of_launch) { \1(of_launch...); }, ', source
    )
    assert count == source.count("<<<"), "a launch is written in a way that is not translated"
    return text


def build_program(folder: Path) -> Path:
    """Builds program.cpp with every kernel. What runs on the emulated device has the sanitizers."""
    objects = [*_compile(folder, ["-O2"], ["emulation"]), *_compile(folder, ["-O1"], ["program"])]
    return _link_program(folder, [*objects, *_compile_kernels(folder, build.csrc())])


def words_about(fault: Fault, folder: Path, whole: Path, cases: int) -> str:
    """Returns what is said when the fault is in a copy of the sources; empty where nobody sees it.

    Args:
        folder: is made here.
        whole: of the program without the fault, from which that comes which the fault does not touch.
    """
    csrc = folder / "csrc"
    shutil.copytree(build.csrc(), csrc)
    fault.put_into(csrc)
    hit = [Path(fault.file).stem] if fault.file.endswith(".cu") else _kernels()
    kept = [whole / f"{name}.o" for name in ("emulation", "program", *_kernels()) if name not in hit]
    program = _link_program(folder, [*kept, *_compile_kernels(folder, csrc, hit)])
    try:
        run_program(program, cases=cases)
    except RuntimeError as found:
        return str(found)
    return ""


def build_library(folder: Path) -> Path:
    """Builds a library that registers the emulated kernels with PyTorch, as those of the CPU."""
    from torch.utils.cpp_extension import include_paths, library_paths

    flags = ["-O2", "-fPIC"]
    objects = [*_compile(folder, flags, ["emulation"]), *_compile_kernels(folder, build.csrc(), flags=flags)]
    wrappers = [path for path in build.sources(with_cuda=True) if path.parent.name == "cuda" and path.suffix == ".cpp"]
    unit = folder / "ops.cpp"
    heads = ("ATen/ATen.h", "torch/library.h", "c10/cuda/CUDAGuard.h", "common/registration.cpp")
    lines = [f'#include "{name}"' for name in heads]
    lines += ["#define CUDA CPU  // the dispatch key", *(f'#include "{path}"' for path in wrappers)]
    unit.write_text("\n".join(lines) + "\n")
    standard = next(flag for flag in build.cxx_args() if flag.startswith("-std"))
    includes = [f"-I{path}" for path in (HERE / "stand_in", *include_paths())]
    objects.append(_compile_one(unit, folder / "ops.o", build.csrc(), ["-O0", "-fPIC", standard, *includes]))
    library = folder / "emulated.so"
    torch = [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch", "-ltorch_cpu"]
    # Symbolic: where PyTorch has brought the CUDA runtime, its functions have the same names.
    _run(build.compiler(), "-shared", "-Wl,-Bsymbolic", *objects, *torch, "-o", library)
    return library


def run_program(program: Path, *, seed: int = 1, cases: int, with_large: bool = False) -> str:
    """Returns what the program printed. Raises RuntimeError with everything it said where something is wrong."""
    return _run(program, str(seed), str(cases), *(["large"] if with_large else []))


def _kernels() -> list[str]:
    return [path.stem for path in build.sources(with_cuda=True) if path.suffix == ".cu"]


def _compile(folder: Path, flags: Sequence[str], names: Sequence[str]) -> list[Path]:
    return [_compile_one(HERE / f"{name}.cpp", folder / f"{name}.o", build.csrc(), flags) for name in names]


def _compile_kernels(
    folder: Path, csrc: Path, names: Sequence[str] = (), flags: Sequence[str] = ("-Og", *_SANITIZERS)
) -> list[Path]:
    made = []
    for name in names or _kernels():
        source, unit = csrc / "cuda" / f"{name}.cu", folder / f"{name}.cpp"
        unit.write_text(f'#include "emulation.h"\n#line 1 "{source}"\n{translated(source.read_text())}')
        made.append(_compile_one(unit, folder / f"{name}.o", csrc, flags))
    return made


def _compile_one(source: Path, made: Path, csrc: Path, flags: Sequence[str]) -> Path:
    standard = [] if any(flag.startswith("-std") for flag in flags) else ["-std=c++17"]
    common = [*standard, "-g1", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    includes = [f"-I{path}" for path in (csrc, HERE, toolkit())]
    _run(build.compiler(), *common, *flags, *includes, "-c", source, "-o", made)
    return made


def _link_program(folder: Path, objects: Sequence[Path]) -> Path:
    program = folder / "program"
    _run(build.compiler(), *_SANITIZERS, *objects, "-o", program)
    return program


def _run(*command: str | Path) -> str:
    # A fiber's stack is none that the sanitizers know.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout
