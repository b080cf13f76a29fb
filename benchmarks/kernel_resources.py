# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels take of a multiprocessor, as the compiler says it; needs nvcc, and no GPU.

    python benchmarks/kernel_resources.py --out benchmarks/results/kernel_resources.json

Compiles csrc/cuda/*.cu with the flags of a build, for each architecture. A row is a kernel with its templates' numbers
of registers of a thread, the bytes of registers that it spills, and the bytes of shared memory: of all template
arguments the smallest and the largest.
"""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from _common import make_parser, origin, progress, tell

from deepspeed_acco.optim import build

# What ptxas says of a kernel with -v, in this order.
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'"
    r".*?(?P<stored>\d+) bytes spill stores, (?P<loaded>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
SHARED = re.compile(r"(\d+) bytes smem")


def parse_arguments():
    parser = make_parser(__doc__)
    names = sorted(path.stem for path in (build.csrc() / "cuda").glob("*.cu"))
    parser.add_argument("--sources", nargs="+", default=names, choices=names)
    parser.add_argument("--architectures", nargs="+", default=["sm_80", "sm_90", "sm_100"])
    return parser.parse_args()


def compiled(source: Path, architecture: str) -> str:
    """Returns what ptxas says of a file's kernels."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *build.nvcc_args(), f"-I{build.csrc()}", f"-arch={architecture}", "-Xptxas=-v", "-c"]
        done = subprocess.run([*command, source, "-o", f"{folder}/made.o"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"nvcc could not compile {source.name} for {architecture}:\n{done.stderr}")
    return done.stderr


def plain_name(mangled: str) -> str:
    """Returns the kernel's own name; whether all operands are aligned is a part of it."""
    name = re.search(r"(\w*?_kernel|increment_step|prepare\w*)", re.sub(r"\d+", " ", mangled))
    is_wide = re.search(r"ILb([01])E", mangled)
    of_width = {None: "", "1": ", all operands aligned", "0": ", any alignment"}[is_wide.group(1) if is_wide else None]
    return (name.group(1) if name else mangled) + of_width


def main() -> None:
    args = parse_arguments()
    if shutil.which("nvcc") is None:
        raise SystemExit("kernel_resources: nvcc was not found on the path. Install the CUDA toolkit")
    kernels: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    for source in args.sources:
        for architecture in args.architectures:
            progress(f"{source}.cu for {architecture}")
            for found in KERNEL.finditer(compiled(build.csrc() / "cuda" / f"{source}.cu", architecture)):
                shared = SHARED.search(found["rest"])
                figures = (
                    int(found["registers"]),
                    int(found["stored"]) + int(found["loaded"]),
                    int(shared[1]) if shared else 0,
                )
                kernels.setdefault((plain_name(found["name"]), architecture), []).append(figures)
    rows = []
    for (name, architecture), figures in sorted(kernels.items()):
        registers, spilled, shared_bytes = zip(*figures)
        rows.append(
            {
                "kernel": name,
                "architecture": architecture,
                "variants": len(figures),
                "registers": [min(registers), max(registers)],
                "spilled_bytes": max(spilled),
                "shared_bytes": max(shared_bytes),
            }
        )
    if not rows:
        raise SystemExit("kernel_resources: nvcc said nothing of any kernel")
    tell({**origin(), "rows": rows}, args.out)


if __name__ == "__main__":
    main()
