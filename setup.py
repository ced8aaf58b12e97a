"""Builds the native libraries; everything else about the package stands in pyproject.toml.

Environment:
    FUSEDRNN_BUILD_CPU=0|1   leave the CPU library out | fail if it cannot be built (by default it is left out then,
                             and fusedrnn.backends() says why)
    FUSEDRNN_SANITIZE=LIST   for instance address,undefined: a build for tests
"""

import json
import os
import platform
import re
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ImportError:
    sys.exit(
        "fusedrnn is built against the torch that is installed, and there is none here. Install torch first, then run\n"
        "    pip install --no-build-isolation .\n"
        "(without --no-build-isolation, pip builds in an environment of its own that has no torch)."
    )

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "fusedrnn" / "__init__.py").read_text()).group(1)
SANITIZE = os.environ.get("FUSEDRNN_SANITIZE", "")

# The oldest torch whose stable ABI has all we use; the library then serves every later torch, and every Python.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Contracting a * b + c is what the kernels are written for; nothing that changes the meaning of NaN or infinity.
OPTIMISE = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
CHECK = ["-O1", "-g1", "-ffp-contract=fast", f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++20", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", *DEFINES, *(CHECK if SANITIZE else OPTIMISE)]

# One source for every instruction set; which one runs is decided on the machine it runs on.
ISA_FLAGS = {"kernels_portable.cpp": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["kernels_avx2.cpp"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["kernels_avx512.cpp"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]


class BuildNative(BuildExtension):
    """Compiles each kernel file with its own flags; leaves the library out, with the reason, if it cannot be built."""

    def finalize_options(self):
        super().finalize_options()
        # Kept from one build to the next, which an editable install's own temporary folder is not.
        self.build_temp = str(ROOT / "build" / ("sanitized" if SANITIZE else "objects"))

    def run(self):
        self.failures = {}
        super().run()
        info = {
            "torch": torch.__version__,
            "compiler": self._compiler(),
            "flags": FLAGS,
            "isa": [Path(name).stem.removeprefix("kernels_") for name in ISA_FLAGS],
        }
        target = Path(self.get_ext_fullpath("fusedrnn._cpu")).parent / "_build.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({**info, "failures": self.failures}, indent=2) + "\n")

    def build_extensions(self):
        try:
            compiler = shlex.split(get_cxx_compiler())[0]
            if shutil.which(compiler) is None:
                raise RuntimeError(f"there is no C++ compiler: {compiler} was not found")
            super().build_extensions()
        except Exception as error:
            if os.environ.get("FUSEDRNN_BUILD_CPU") == "1":
                raise
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            self.failures["cpu"] = f"the build failed ({reason})"
            print(f"fusedrnn: the CPU library is left out: {self.failures['cpu']}", file=sys.stderr)
            self.extensions.clear()

    def build_extension(self, ext):
        objects = []
        for source, flags in ISA_FLAGS.items():
            objects += self.compiler.compile(
                [f"csrc/cpu/{source}"],
                output_dir=self.build_temp,
                extra_postargs={"cxx": FLAGS + flags},
                depends=[str(path) for path in Path("csrc/cpu").glob("*.h")],
            )
        ext.extra_objects = objects
        super().build_extension(ext)

    def _compiler(self):
        command = getattr(getattr(self, "compiler", None), "compiler_cxx", None)
        return " ".join(command) if command else None


def extensions():
    if os.environ.get("FUSEDRNN_BUILD_CPU") == "0":
        return []
    return [
        CppExtension(
            "fusedrnn._cpu",
            ["csrc/cpu_ops.cpp", "csrc/cpu/instruction_sets.cpp"],
            depends=[str(path) for path in Path("csrc/cpu").glob("*.h")],
            extra_compile_args={"cxx": FLAGS},
            extra_link_args=[f"-fsanitize={SANITIZE}"] if SANITIZE else [],
            py_limited_api=True,
        )
    ]


setup(
    version=VERSION,
    # Named one by one: the Triton kernels lie in kernels/ and are installed as fusedrnn.kernels.
    packages=["fusedrnn", "fusedrnn.benchmarks", "fusedrnn.kernels"],
    package_dir={"fusedrnn.benchmarks": "benchmarks", "fusedrnn.kernels": "kernels"},
    package_data={"fusedrnn": ["py.typed"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
