"""Builds the optional libraries of kernels: csrc/cpu once per instruction set, csrc/cuda with nvcc.

Neither is needed: without a compiler, or without nvcc, the package installs with the reference backend and
`python -m minisora_kernels` tells what was not built and why. An instruction set that the compiler does not know is
left out, and a CPU that has it runs the next less. No part of this file imports torch: its headers and libraries are
found in the environment that is being installed into, or else in the build environment (see build_backend/backend.py).

Environment variables:
    MINISORA_CPU=0      do not build the CPU kernels
    MINISORA_CUDA=0     do not build the CUDA kernels; MINISORA_CUDA=1: build them even against a torch without CUDA
                        (a compile check: such a library cannot be loaded)
    TORCH_CUDA_ARCH_LIST  architectures for nvcc, as torch spells them; default below
    CXX, MAX_JOBS       as usual
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
VARIANTS = {
    "cpu_avx2": ["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2", *AVX2],
    "cpu_avx512": ["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512", *AVX512],
    "cpu_avx512_bf16": ["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512", *AVX512_BF16],
    "cpu_amx": ["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512", *AMX],
}
# A GPU newer than the last of these gets code from PTX, when a kernel is first loaded.
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
# The least torch that pyproject.toml allows, as TORCH_TARGET_VERSION spells it.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def find_torch() -> Path | None:
    """The folder of the torch to build against."""
    for path in ([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")], sys.path):
        spec = PathFinder.find_spec("torch", path)
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent
    return None


def sources(backend: str) -> list[str]:
    pattern = "*.cu" if backend == "cuda" else "*.cpp"
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / backend).glob(pattern))


class Build(build_ext):
    """Compiles the sources side by side, records in build_record.json what was built, never fails the installation."""

    def run(self) -> None:
        package = ROOT / "minisora_kernels" if self.inplace else Path(self.build_lib) / "minisora_kernels"
        package.mkdir(parents=True, exist_ok=True)
        torch = find_torch()
        record: dict[str, dict] = {"cpu": self.build_cpu(package, torch), "cuda": self.build_cuda(package, torch)}
        if torch is not None:
            version = (torch / "version.py").read_text()
            record["torch"] = {"version": version.split("__version__ = ")[1].split("\n")[0].strip("'\"")}
        (package / "build_record.json").write_text(json.dumps(record, indent=2) + "\n")
        for backend in ("cpu", "cuda"):
            if "not_built" in record[backend]:
                for stale in package.glob(f"_{backend}*.so"):  # of an earlier build; it would be loaded
                    stale.unlink()
                print(f"minisora_kernels: no {backend} kernels: {record[backend]['not_built']}")
        for variant, reason in record["cpu"].get("left_out", {}).items():
            (package / f"_{variant}.so").unlink(missing_ok=True)
            print(f"minisora_kernels: no {variant}: {reason}")

    def build_cpu(self, package: Path, torch: Path | None) -> dict:
        compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "c++"]
        if os.environ.get("MINISORA_CPU") == "0":
            return {"not_built": "MINISORA_CPU=0"}
        if torch is None:
            return {"not_built": "no torch was found to build against"}
        if not sources("cpu"):
            return {"not_built": "csrc/cpu has no sources"}
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return {"not_built": f"the kernels are written for x86-64, this machine is {platform.machine()}"}
        if shutil.which(compiler[0]) is None:
            return {"not_built": "no C++ compiler was found (c++, g++ or $CXX); install one and run pip again"}
        common = [*compiler, "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd"]
        common += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-unknown-pragmas", f"-I{torch / 'include'}"]
        common += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # gcc 12 says so of its own AVX-512 headers
        # A variant is left out only if its flags are not known. Probing writes nothing: a full disk is another failure.
        empty = ["-fsyntax-only", "-x", "c++", os.devnull]
        probed = {variant: self.call([*compiler, *flags, *empty]) for variant, flags in VARIANTS.items()}
        left_out = {variant: error for variant, error in probed.items() if error}
        libraries = [variant for variant in VARIANTS if variant not in left_out]
        if not libraries:
            return {"not_built": next(iter(left_out.values()))}
        commands = {
            f"{variant}/{Path(source).stem}.o": [*common, *VARIANTS[variant], "-c", source]
            for variant in libraries
            for source in sources("cpu")
        }
        failed = self.compile(commands)
        for variant in libraries:
            objects = [str(self.object(f"{variant}/{Path(source).stem}.o")) for source in sources("cpu")]
            link = [*compiler, "-shared", *objects, f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
            failed = failed or self.call([*link, "-o", str(package / f"_{variant}.so")])
        if failed:
            return {"not_built": failed}
        record = {"compiler": version_line([*compiler, "--version"], ""), "libraries": libraries}
        return record | ({"left_out": left_out} if left_out else {})

    def build_cuda(self, package: Path, torch: Path | None) -> dict:
        wanted = os.environ.get("MINISORA_CUDA")
        nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
        if wanted == "0":
            return {"not_built": "MINISORA_CUDA=0"}
        if torch is None:
            return {"not_built": "no torch was found to build against"}
        if wanted != "1" and not (torch / "lib" / "libtorch_cuda.so").exists():
            return {"not_built": "this torch is a CPU build"}
        if nvcc is None:
            return {"not_built": "nvcc was not found"}
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        common = [nvcc, "-std=c++20", "-O3", "-Xcompiler", "-fPIC", STABLE_ABI, "-DUSE_CUDA", f"-I{torch / 'include'}"]
        common += ["-Xcompiler", "-Wall", "--expt-relaxed-constexpr", "--threads", "0", *gencode(architectures)]
        commands = {f"cuda/{Path(source).stem}.o": [*common, "-c", source] for source in sources("cuda")}
        failed = self.compile(commands)
        if not failed:
            objects = [str(self.object(name)) for name in commands]
            libraries = ["-ltorch_cpu", "-lc10"]
            if (torch / "lib" / "libtorch_cuda.so").exists():
                libraries.append("-ltorch_cuda")
            failed = self.call(
                [nvcc, "-shared", *objects, f"-L{torch / 'lib'}", *libraries, "-o", str(package / "_cuda.so")]
            )
        if failed:
            return {"not_built": failed}
        return {"compiler": version_line([nvcc, "--version"], "release"), "architectures": architectures}

    def object(self, name: str) -> Path:
        path = Path(self.build_temp) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def compile(self, commands: dict[str, list[str]]) -> str | None:
        """Run the commands side by side, each writing its object file; the first error, or None."""
        jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(jobs) as pool:
            errors = pool.map(lambda item: self.call([*item[1], "-o", str(self.object(item[0]))]), commands.items())
            return next((error for error in errors if error), None)

    def call(self, command: list[str]) -> str | None:
        print(" ".join(command), flush=True)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        sys.stderr.write(done.stderr)
        if done.returncode == 0:
            return None
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-3:]
        return f"`{' '.join(command)}` failed: {'; '.join(errors[:3])}"


def gencode(architectures: str) -> list[str]:
    flags = []
    for entry in architectures.replace(" ", ";").split(";"):
        number = entry.removesuffix("+PTX").replace(".", "")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if entry.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def version_line(command: list[str], word: str) -> str:
    """The first line with ``word`` in it of what a compiler says of itself."""
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return next((line.strip() for line in lines if word in line), "of unknown version")


# One extension stands for both libraries, so that setuptools runs the command and makes a wheel of this platform.
setup(ext_modules=[Extension("minisora_kernels._kernels", sources=[])], cmdclass={"build_ext": Build})
