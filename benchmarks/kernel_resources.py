# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""What the CUDA kernels take of a multiprocessor, as the compiler says it; needs nvcc, and no GPU.

    python benchmarks/kernel_resources.py --out benchmarks/results/kernel_resources.json

Compiles csrc/cuda/*.cu with the flags of a build, for each architecture. A row is a kernel with its templates' numbers
of registers of a thread, the bytes of registers that it spills, and the bytes of shared memory: of all template
arguments the smallest and the largest. Where cuobjdump is found (it comes with the CUDA toolkit, with nvdisasm beside
it), a row also has its load and store instructions of global memory by their bits, of all variants
together.
"""

import re
import shutil
import subprocess
import tempfile
from collections import Counter
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
# Of cuobjdump -sass: the head of a kernel, and accesses of global memory, whose width follows their modifiers.
FUNCTION = re.compile(r"^\s*Function : (\w+)$", re.MULTILINE)
ACCESS = re.compile(r"\b(LDG|STG)\.E((?:\.\w+)*)")
WIDTH = re.compile(r"\.[US]?(8|16|64|128|256)(?=\.|$)")


def parse_arguments():
    parser = make_parser(__doc__)
    names = sorted(path.stem for path in (build.csrc() / "cuda").glob("*.cu"))
    parser.add_argument("--sources", nargs="+", default=names, choices=names)
    parser.add_argument("--architectures", nargs="+", default=["sm_80", "sm_90", "sm_100"])
    parser.add_argument("--cuobjdump", help="the program (default: the one on the path, if any)")
    args = parser.parse_args()
    if args.cuobjdump is None:
        args.cuobjdump = shutil.which("cuobjdump")
    elif shutil.which(args.cuobjdump) is None:
        parser.error(f"--cuobjdump {args.cuobjdump} is not a program; give the path of the CUDA toolkit's cuobjdump")
    return args


def compiled(source: Path, architecture: str, cuobjdump: str | None) -> tuple[str, str]:
    """Returns what ptxas says of a file's kernels, and their instructions, empty without a disassembler."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *build.nvcc_args(), f"-I{build.csrc()}", f"-arch={architecture}", "-Xptxas=-v", "-c"]
        made = f"{folder}/made.o"
        done = subprocess.run([*command, source, "-o", made], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"nvcc could not compile {source.name} for {architecture}:\n{done.stderr}")
        if cuobjdump is None:
            return done.stderr, ""
        read = subprocess.run([cuobjdump, "-sass", made], capture_output=True, text=True)
    if read.returncode or not FUNCTION.search(read.stdout):
        raise SystemExit(f"{cuobjdump} could not read {source.name} for {architecture}:\n{read.stderr}")
    return done.stderr, read.stdout


def accesses_of(instructions: str) -> dict[str, Counter[tuple[str, int]]]:
    """Returns how many loads and stores of global memory each kernel, by its mangled name, has of each width in bits:
    ``{"...adamw_kernel...": {("LDG", 128): 3, ("STG", 64): 1}}``."""
    found = {}
    names = FUNCTION.split(instructions)[1:]
    for name, body in zip(names[::2], names[1::2]):
        found[name] = Counter()
        for kind, modifiers in ACCESS.findall(body):
            width = WIDTH.search(modifiers)
            found[name][kind, int(width[1]) if width else 32] += 1
    return found


def of_kind(accesses: Counter[tuple[str, int]], kind: str) -> dict[str, int]:
    """Returns the counts by width of one kind, as JSON has them."""
    return {str(bits): count for (of, bits), count in sorted(accesses.items()) if of == kind}


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
    if args.cuobjdump is None:
        print("kernel_resources: no cuobjdump on the path, so no widths of loads and stores; --cuobjdump names one")
    kernels: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    accesses: dict[tuple[str, str], Counter[tuple[str, int]]] = {}
    for source in args.sources:
        for architecture in args.architectures:
            progress(f"{source}.cu for {architecture}")
            said, instructions = compiled(build.csrc() / "cuda" / f"{source}.cu", architecture, args.cuobjdump)
            for name, widths in accesses_of(instructions).items():
                accesses.setdefault((plain_name(name), architecture), Counter()).update(widths)
            for found in KERNEL.finditer(said):
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
        widths = accesses.get((name, architecture))
        rows.append(
            {
                "kernel": name,
                "architecture": architecture,
                "variants": len(figures),
                "registers": [min(registers), max(registers)],
                "spilled_bytes": max(spilled),
                "shared_bytes": max(shared_bytes),
                "loads": None if widths is None else of_kind(widths, "LDG"),
                "stores": None if widths is None else of_kind(widths, "STG"),
            }
        )
    if not rows:
        raise SystemExit("kernel_resources: nvcc said nothing of any kernel")
    tell({**origin(), "rows": rows}, args.out)


if __name__ == "__main__":
    main()
