"""Builds the native libraries; everything else about the package stands in pyproject.toml.

Environment:
    FUSEDRNN_BUILD_CPU=0|1   leave the CPU library out | fail if it cannot be built (by default it is left out then,
                             and fusedrnn.backends() says why)
    FUSEDRNN_BUILD_CUDA=0|1  the same for the CUDA library; by default it is built where torch has CUDA and nvcc is
                             there. 1 builds it against any torch, on a machine without a GPU as well
    TORCH_CUDA_ARCH_LIST     what to compile the CUDA kernels for, by default "8.0;9.0a;10.0+PTX"; "8.0;9.0+PTX" where
                             nvcc does not know 10.0
    CUDA_HOME                where nvcc is, if it is not in PATH
    MAX_JOBS                 kernel sources that are compiled at the same time, by default one for each processor
    FUSEDRNN_CUDA_DEBUG=1    a CUDA kernel in which a block waits for more than half a second prints which one and for
                             what, and ends with an error instead of hanging
    FUSEDRNN_SANITIZE=LIST   for instance address,undefined: a build of the CPU library for tests, in which the kernels
                             for AMX run on emulated tiles, as the instruction set amx_emulated
"""

import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import setup

OLDEST_SETUPTOOLS = 77  # older ones do not know the license's form in pyproject.toml, and say so on two pages
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(
        f"fusedrnn is built with setuptools {OLDEST_SETUPTOOLS} or later, this is {setuptools.__version__}. Run\n"
        f'    pip install "setuptools>={OLDEST_SETUPTOOLS}" wheel ninja'
    )
try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ImportError:
    sys.exit(
        "fusedrnn is built against the torch that is installed, and there is none here. Install torch first, then run\n"
        "    pip install --no-build-isolation .\n"
        "uv pip takes the same option, python -m build calls it --no-isolation: an isolated build sees no torch."
    )

ROOT = Path(__file__).parent
CELLS = Path("csrc/cells")
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "fusedrnn" / "version.py").read_text()).group(1)
SOURCES = runpy.run_path(str(ROOT / "fusedrnn" / "sources.py"))
SANITIZE = os.environ.get("FUSEDRNN_SANITIZE", "")

# The oldest torch whose stable ABI has all we use; the library then serves every later torch, and every Python.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Contracting a * b + c is what the kernels are written for; nothing that changes the meaning of NaN or infinity.
OPTIMISE = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
CHECK = [
    "-O1",
    "-g1",
    "-ffp-contract=fast",
    "-DFUSEDRNN_EMULATE_TILES",
    "-Wno-psabi",
    f"-fsanitize={SANITIZE}",
    "-fno-sanitize-recover=all",
]
FLAGS = ["-std=c++20", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", *DEFINES, *(CHECK if SANITIZE else OPTIMISE)]

# One source for every instruction set; which one runs is decided on the machine it runs on.
ISA_FLAGS = {"kernels_portable.cpp": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["kernels_avx2.cpp"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["kernels_avx512.cpp"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
    ISA_FLAGS["kernels_avx512_bf16.cpp"] = [*ISA_FLAGS["kernels_avx512.cpp"], "-mavx512bf16"]
    # Its tiles are in assembly, or emulated.
    ISA_FLAGS["kernels_amx.cpp"] = [] if SANITIZE else ISA_FLAGS["kernels_avx512_bf16.cpp"]
elif SANITIZE:
    ISA_FLAGS["kernels_amx.cpp"] = []

NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
DEBUG = os.environ.get("FUSEDRNN_CUDA_DEBUG") == "1"
if DEBUG:
    NVCC_FLAGS.append("-DFUSEDRNN_CUDA_TIMEOUT=1000000000LL")  # clock cycles: half a second at 2 GHz
OLDEST_ARCHITECTURE = 80


def find_nvcc():
    """The path of nvcc, or None."""
    folders = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return (
        shutil.which("nvcc", path=os.pathsep.join(folders))
        if folders
        else shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    )


def output_of(*command):
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def architectures(nvcc):
    """The architectures to compile for, as ("90a", with PTX or not): supported ones of TORCH_CUDA_ARCH_LIST."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not named:
        known = output_of(nvcc, "--list-gpu-arch").split()
        named = "8.0;9.0a;10.0+PTX" if "compute_100" in known else "8.0;9.0+PTX"
    found = []
    for name in re.split(r"[;,\s]+", named.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if match is None:
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST has {name!r}: expected numbers such as 9.0, 9.0a or 9.0+PTX")
        major, minor, suffix, ptx = match.groups()
        if int(major + minor) >= OLDEST_ARCHITECTURE:
            found.append((major + minor + suffix, ptx is not None))
    if not found:
        raise RuntimeError(f"the CUDA kernels need an architecture of 8.0 or later, TORCH_CUDA_ARCH_LIST has {named}")
    return found


def code_flags(architectures):
    flags = []
    for name, ptx in architectures:
        codes = [f"sm_{name}", *([f"compute_{name}"] if ptx else [])]
        flags.append(f"-gencode=arch=compute_{name},code=[{','.join(codes)}]")
    return flags


def jobs():
    """The number of parallel compilations."""
    return int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1


def library_folders(nvcc):
    """The library folder of nvcc's toolkit."""
    line = re.search(r"LIBRARIES=(.*)", output_of(nvcc, "-dryrun", "-x", "cu", "-o", os.devnull, os.devnull))
    return [flag.removeprefix("-L") for flag in shlex.split(line.group(1)) if not flag.endswith("stubs")]


class BuildNative(BuildExtension):
    """Builds each library in its own way; leaves one out, with the reason, if it cannot be built."""

    def finalize_options(self):
        super().finalize_options()
        # Kept from one build to the next, which an editable install's own temporary folder is not.
        kind = "sanitized" if SANITIZE else "debug-objects" if DEBUG else "objects"
        self.build_temp = str(ROOT / "build" / kind)

    def run(self):
        self.failures, self.info = {}, {}
        super().run()
        info = {
            "torch": torch.__version__,
            "compiler": self._compiler(),
            "flags": FLAGS,
            "isa": [Path(name).stem.removeprefix("kernels_") for name in ISA_FLAGS],
            "sources": {name: SOURCES["digest"](ROOT, name) for name in ("cpu", "cuda")},
            **self.info,
        }
        target = Path(self.get_ext_fullpath("fusedrnn._cpu")).parent / "_build.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({**info, "failures": self.failures}, indent=2) + "\n")

    def build_extensions(self):
        wanted = {library_name(ext): not_wanted(library_name(ext)) for ext in self.extensions}
        self.failures |= {name: why for name, why in wanted.items() if why is not None}
        self._drop_failures()
        if not self.extensions:
            return
        try:
            compiler = shlex.split(get_cxx_compiler())[0]
            if shutil.which(compiler) is None:
                raise RuntimeError(f"there is no C++ compiler: {compiler} was not found")
            super().build_extensions()
        except Exception as error:
            if any(asked_for(library_name(ext)) == "1" for ext in self.extensions):
                raise
            for ext in self.extensions:
                self._leave_out(ext, error)
        self._drop_failures()

    def build_extension(self, ext):
        try:
            ext.extra_objects = self._cpu_objects() if library_name(ext) == "cpu" else self._cuda_objects(ext)
            super().build_extension(ext)
        except Exception as error:
            self._leave_out(ext, error)

    def _drop_failures(self):
        self.extensions[:] = [ext for ext in self.extensions if library_name(ext) not in self.failures]

    def _leave_out(self, ext, error):
        name = library_name(ext)
        if asked_for(name) == "1":
            raise error
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        self.failures[name] = f"the build failed ({reason})"
        print(f"fusedrnn: the {name.upper()} library is left out: {self.failures[name]}", file=sys.stderr)

    def _cpu_objects(self):
        compiler = [*shlex.split(get_cxx_compiler()), *FLAGS, "-fPIC"]
        folder = Path("csrc/cpu")
        return self._compiled({folder / source: [*compiler, *flags] for source, flags in ISA_FLAGS.items()})

    def _cuda_objects(self, ext):
        """The kernels, by nvcc itself: torch's own build of .cu files refuses to work for a torch without CUDA."""
        nvcc = find_nvcc()
        if nvcc is None:
            raise RuntimeError("nvcc was not found: it is neither in PATH nor in CUDA_HOME")
        chosen = architectures(nvcc)
        sources = sorted(Path("csrc/cuda").rglob("*.cu"))
        threads = ["--threads", str(max(1, min(len(chosen), jobs() // len(sources))))]
        command = [nvcc, *NVCC_FLAGS, *code_flags(chosen), *threads]
        objects = self._compiled(dict.fromkeys(sources, command))
        ext.library_dirs += library_folders(nvcc)
        version = re.search(r"release ([\d.]+)", output_of(nvcc, "--version")).group(1)
        built_for = [name + "+PTX" * ptx for name, ptx in chosen]
        self.info["cuda"] = {"nvcc": version, "architectures": built_for, "flags": NVCC_FLAGS}
        return objects

    def _compiled(self, commands):
        """The object of each source, made by the command beside it unless one is there that is as new as the headers of
        its folder, of those above in csrc, and of the cells."""

        def compiled(source, command):
            folder = Path(self.build_temp) / source.parent
            folder.mkdir(parents=True, exist_ok=True)
            target, made_by = folder / f"{source.stem}.o", folder / f"{source.stem}.command"
            folders = (*source.parents[:-2], CELLS)  # those below csrc
            headers = (path for near in folders for path in near.glob("*") if path.suffix in (".h", ".cuh"))
            newest = max(path.stat().st_mtime for path in (source, *headers))
            fresh = target.is_file() and target.stat().st_mtime > newest
            if not (fresh and made_by.is_file() and made_by.read_text() == shlex.join(command)):
                made_by.unlink(missing_ok=True)
                output_of(*command, "-c", str(source), "-o", str(target))
                made_by.write_text(shlex.join(command))
            return str(target)

        with ThreadPoolExecutor(jobs()) as pool:
            return list(pool.map(compiled, commands.keys(), commands.values()))

    def _compiler(self):
        command = getattr(getattr(self, "compiler", None), "compiler_cxx", None)
        return " ".join(command) if command else None


def library_name(ext):
    """cpu or cuda."""
    return ext.name.removeprefix("fusedrnn._")


def asked_for(name):
    return os.environ.get(f"FUSEDRNN_BUILD_{name.upper()}", "")


def not_wanted(name):
    """Why a library is not even tried, or None."""
    if asked_for(name) == "0":
        return f"FUSEDRNN_BUILD_{name.upper()} was 0"
    if name == "cuda" and asked_for(name) != "1":
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is without CUDA; FUSEDRNN_BUILD_CUDA=1 builds it all the same"
        if find_nvcc() is None:
            return "nvcc was not found: it is neither in PATH nor in CUDA_HOME"
    return None


def extension(name):
    folder = Path("csrc") / name
    headers = (*folder.rglob("*.h"), *CELLS.glob("*.h"), Path("fusedrnn/operators.def"))
    return CppExtension(
        f"fusedrnn._{name}",
        [str(folder / "torch" / "ops.cpp"), *(["csrc/cpu/instruction_sets.cpp"] if name == "cpu" else [])],
        depends=[str(path) for path in headers],
        extra_compile_args={"cxx": [*FLAGS, *(["-DUSE_CUDA"] if name == "cuda" else [])]},
        extra_link_args=CUDA_LINK if name == "cuda" else [f"-fsanitize={SANITIZE}"] if SANITIZE else [],
        py_limited_api=True,
    )


# The CUDA runtime is linked in, hidden: then the library needs none that is as new as its own, whatever CUDA the torch
# that loads it is of. What it needs of torch's CUDA part is found through libtorch.so, which has no symbol of its own.
CUDA_LINK = ["-Wl,--exclude-libs,ALL", "-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--no-as-needed", "-ltorch"]

setup(
    version=VERSION,
    # Named one by one: the Triton kernels lie in kernels/ and are installed as fusedrnn.kernels.
    packages=[
        "fusedrnn",
        "fusedrnn.benchmarks",
        "fusedrnn.cells",
        "fusedrnn.kernels",
        "fusedrnn.kernels.cells",
        "fusedrnn.tuning",
    ],
    package_dir={"fusedrnn.benchmarks": "benchmarks", "fusedrnn.kernels": "kernels"},
    include_package_data=False,  # which would take everything that the sdist has, results of benchmarks among it
    package_data={
        "fusedrnn": ["operators.def", "py.typed"],
        "fusedrnn.benchmarks": ["cuda/*"],
        "fusedrnn.tuning": ["profiles/*.json"],
    },
    ext_modules=[extension("cpu"), extension("cuda")],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
