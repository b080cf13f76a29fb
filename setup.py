# Copyright (c) the deepspeed_acco authors
# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml cannot say: the kernels' sources travel inside the package, and with DEEPSPEED_ACCO_BUILD_OPS=1
the kernels are built at install instead of at first use (this needs PyTorch: pip install --no-build-isolation)."""

import importlib.util
import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildPyWithSources(build_py):
    def run(self):
        super().run()
        if not getattr(self, "editable_mode", False):
            shutil.copytree(ROOT / "csrc", Path(self.build_lib) / "deepspeed_acco" / "csrc", dirs_exist_ok=True)


def native_extension():
    """The extension and the command that builds it, with the sources and flags of the build at first use."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    spec = importlib.util.spec_from_file_location("build", ROOT / "deepspeed_acco" / "optim" / "build.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    recipe.choose_architectures()
    with_cuda, why_not = recipe.cuda_is_buildable()
    if not with_cuda:
        print(f"deepspeed_acco: the kernels are built for CPUs alone: {why_not}")
    architecture = os.environ.get("DEEPSPEED_ACCO_CPU_ARCH", recipe.cpu_architecture())
    extension = (CUDAExtension if with_cuda else CppExtension)(
        name=f"deepspeed_acco.{recipe.EXTENSION}",
        sources=[str(path.relative_to(ROOT)) for path in recipe.sources(with_cuda)],
        include_dirs=[str(recipe.csrc())],
        define_macros=[("ACCO_BUILD", recipe.mark(with_cuda))],
        extra_compile_args={"cxx": recipe.cxx_args(architecture), "nvcc": recipe.nvcc_args()},
        extra_link_args=recipe.ld_args(),
    )
    return extension, BuildExtension


options = {"cmdclass": {"build_py": BuildPyWithSources}}
if os.environ.get("DEEPSPEED_ACCO_BUILD_OPS") == "1":
    extension, command = native_extension()
    options["ext_modules"] = [extension]
    options["cmdclass"]["build_ext"] = command
setup(**options)
