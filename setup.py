"""Builds the optional libraries of kernels: csrc/cpu once per instruction set, csrc/cuda with nvcc.

Neither is needed: without a compiler, or without nvcc, the package installs with the reference backend and
`python -m minisora_kernels` tells what was not built and why. The build skips variants that the compiler does not know;
such CPUs use the next smaller one. No part of this file imports torch: its headers and libraries are found in the
environment that is being installed into, or else in the build environment (see build_backend/backend.py).

ninja compiles, in a folder that stays (build/native/<version of torch>, or --build-temp): what did not change since the
last build is not compiled again, whichever way that build was started.

Environment variables:
    MINISORA_CPU        0: no CPU kernels; native: only the library that this CPU loads; names of VARIANTS with commas
                        between them: only those; not set, or 1: every library that the compiler knows
    MINISORA_CUDA       0: no CUDA kernels; 1: build them into a checkout too whose torch has no CUDA, which does not
                        load them; not set: where nvcc is, into every wheel, and into a checkout whose torch has CUDA
    CUDA_HOME           the CUDA toolkit; not set: that of the nvcc on the path, or else /usr/local/cuda
    TORCH_CUDA_ARCH_LIST  architectures for nvcc, as torch spells them; default below
    CXX, MAX_JOBS       as usual
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
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


def find_nvcc() -> tuple[str | None, str]:
    """nvcc, and where it was looked for."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which(f"{home}/bin/nvcc"), f"CUDA_HOME is {home!r}, which has no bin/nvcc"
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc"), "put it on the path, or set CUDA_HOME"


def digest(backend: str) -> str:
    """Of all sources of a backend; minisora_kernels/backends.py compares it with the checkout that it is in."""
    total, folder = hashlib.sha256(), ROOT / "csrc" / backend
    for path in sorted([*folder.parent.glob("[!.]*.h"), *folder.glob("[!.]*")]):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def native(known: list[str], cpuinfo: str) -> str | None:
    """The last of the ``known`` variants that the CPU of ``cpuinfo`` has the instructions for.

    The rule is that of ``cpu_capability`` in minisora_kernels/backends.py, which asks torch; so is the variable.
    """
    line = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    here = set(line[1].split()) if line else set()
    most = {"default": [], "avx2": ["cpu_avx2"], "avx512": ["cpu_avx2", "cpu_avx512"]}
    allowed = most.get(os.environ.get("ATEN_CPU_CAPABILITY", ""), list(VARIANTS))
    for variant in reversed([variant for variant in known if variant in allowed]):
        flags = {flag.removeprefix("-m") for flag in VARIANTS[variant] if flag.startswith("-m")}
        if {"avx512_bf16" if flag == "avx512bf16" else flag.replace("-", "_") for flag in flags} <= here:
            return variant
    return None


class Library(NamedTuple):
    """A library and how it is built; sources and objects stand between ``link`` and ``libraries``."""

    name: str
    sources: list[str]
    compile: list[str]
    link: list[str]
    libraries: list[str]


def manifest(libraries: list[Library], folder: Path) -> str:
    """What ninja reads: the objects and libraries in ``folder``, each with its command."""

    def path(value: object) -> str:
        return re.sub(r"([$ :])", r"$\1", str(value))

    def text(command: list[str]) -> str:
        return shlex.join(command).replace("$", "$$")

    lines = [f"builddir = {path(folder)}"]
    for name, sources_, compile_, link, needed in libraries:
        lines += [f"rule compile_{name}", f"  command = {text(compile_)} -MD -MF $out.d -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc", f"  description = {name}: $in"]
        lines += [f"rule link_{name}", f"  command = {text(link)} $in {text(needed)} -o $out"]
        lines += [f"  description = {name}.so"]
        objects = [path(folder / name / f"{Path(source).stem}.o") for source in sources_]
        pairs = zip(objects, sources_, strict=True)
        lines += [f"build {target}: compile_{name} {path(source)}" for target, source in pairs]
        lines += [f"build {path(folder / name)}.so: link_{name} {' '.join(objects)}"]
    return "\n".join(lines) + "\n"


class Build(build_ext):
    """Compiles with ninja, records in build_record.json what was built, never fails the installation."""

    def finalize_options(self) -> None:
        self.folder = Path(self.build_temp or ROOT / "build" / "native")  # pip's own build_temp would not stay
        super().finalize_options()

    def run(self) -> None:
        package = ROOT / "minisora_kernels" if self.inplace else Path(self.build_lib) / "minisora_kernels"
        package.mkdir(parents=True, exist_ok=True)
        torch = find_torch()
        record: dict[str, dict] = {}
        if torch is not None:
            version = (torch / "version.py").read_text().split("__version__ = ")[1].split("\n")[0].strip("'\"")
            record["torch"] = {"version": version}
            self.folder /= version
        self.folder.mkdir(parents=True, exist_ok=True)
        record["cpu"], record["cuda"] = self.build_cpu(package, torch), self.build_cuda(package, torch)
        for backend in ("cpu", "cuda"):
            if "not_built" not in record[backend]:
                record[backend]["sources"] = digest(backend)
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
        # The file names every variant, whichever are built: what ninja does not see in it, it may forget.
        libraries = [
            Library(
                variant,
                sources("cpu"),
                [*common, *flags],
                [*compiler, "-shared"],
                [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"],
            )
            for variant, flags in VARIANTS.items()
        ]
        left_out = self.left_out(compiler)
        built = [variant for variant in VARIANTS if variant not in left_out]
        failed = self.ninja("cpu", libraries, built, package) if built else next(iter(left_out.values()))
        if failed:
            return {"not_built": failed}
        record = {"compiler": version_line([*compiler, "--version"], ""), "libraries": built}
        return record | ({"left_out": left_out} if left_out else {})

    def left_out(self, compiler: list[str]) -> dict[str, str]:
        """The variants that are not built, and why: their flags are not known, or they were not asked for."""
        # Probing writes nothing: a full disk is another failure.
        empty = ["-fsyntax-only", "-x", "c++", os.devnull]
        probed = {variant: self.call([*compiler, *flags, *empty]) for variant, flags in VARIANTS.items()}
        left_out = {variant: error for variant, error in probed.items() if error}
        known = [variant for variant in VARIANTS if variant not in left_out]
        choice = os.environ.get("MINISORA_CPU") or "1"
        cpuinfo = Path("/proc/cpuinfo")
        if choice == "1":
            asked = known
        elif choice == "native":
            variant = native(known, cpuinfo.read_text() if cpuinfo.exists() else "")
            asked = [] if variant is None else [variant]
        else:
            asked = choice.split(",")
        if not set(asked) <= set(VARIANTS):
            raise ValueError(f"MINISORA_CPU is {choice!r}; it may be 0, 1, native, or some of {','.join(VARIANTS)}")
        reason = "this CPU is not known to have AVX2" if not asked else f"only {','.join(asked)} was asked for"
        others = [variant for variant in known if variant not in asked]
        return left_out | dict.fromkeys(others, f"MINISORA_CPU={choice}: {reason}")

    def build_cuda(self, package: Path, torch: Path | None) -> dict:
        wanted = os.environ.get("MINISORA_CUDA")
        if wanted == "0":
            return {"not_built": "MINISORA_CUDA=0"}
        if torch is None:
            return {"not_built": "no torch was found to build against"}
        # A wheel may be installed beside another build of this torch, a checkout is not.
        if wanted != "1" and self.inplace and not (torch / "lib" / "libtorch_cuda.so").exists():
            return {"not_built": "this torch is a CPU build"}
        nvcc, tried = find_nvcc()
        if nvcc is None:
            return {"not_built": f"nvcc was not found: {tried}"}
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        common = [nvcc, "-std=c++20", "-O3", "-Xcompiler", "-fPIC", STABLE_ABI, "-DUSE_CUDA", f"-I{torch / 'include'}"]
        common += ["-Xcompiler", "-Wall", "--expt-relaxed-constexpr", "--threads", "0", *gencode(architectures)]
        # A torch without CUDA lacks one library to link with. An empty one of its name stands in: nothing is read of
        # it but the name, by which the loader finds the library of the torch that runs.
        stub = self.folder / "cuda" / "stub" / "libtorch_cuda.so"
        stub.parent.mkdir(parents=True, exist_ok=True)
        named = ["-Xlinker", f"-soname={stub.name}", "-x", "c++", os.devnull, "-o", str(stub)]
        failed = self.call([nvcc, "-shared", *named])
        # CUDA's runtime is linked in, and all of torch is kept: an import needs no CUDA library.
        link = [nvcc, "-shared", "--cudart", "static", "-Xlinker", "--no-as-needed"]
        needed = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-L{stub.parent}", "-ltorch_cuda"]
        library = Library("cuda", sources("cuda"), common, link, needed)
        failed = failed or self.ninja("cuda", [library], ["cuda"], package)
        if failed:
            return {"not_built": failed}
        return {"compiler": version_line([nvcc, "--version"], "release"), "architectures": architectures}

    def ninja(self, backend: str, libraries: list[Library], names: list[str], package: Path) -> str | None:
        """Bring the ``names`` among ``libraries`` up to date and into the package; the first error, or None."""
        # The environment's before the system's: one ninja may start over on the log of another.
        program = shutil.which("ninja", path=sysconfig.get_path("scripts")) or shutil.which("ninja")
        if program is None:
            return "ninja was not found; pip brings it, unless it was told not to isolate the build: pip install ninja"
        folder = Path(os.path.relpath(self.folder, ROOT) if self.folder.is_relative_to(ROOT) else self.folder) / backend
        (ROOT / folder).mkdir(exist_ok=True)
        (ROOT / folder / "build.ninja").write_text(manifest(libraries, folder))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jobs = os.environ.get("MAX_JOBS") or str(cores)
        command = [
            program,
            "-f",
            str(folder / "build.ninja"),
            "-j",
            jobs,
            *(str(folder / f"{name}.so") for name in names),
        ]
        failed = self.follow(command)
        for name in [] if failed else names:
            # In one step: a process that has the old library open keeps it whole.
            new = shutil.copy(ROOT / folder / f"{name}.so", package / f"_{name}.so.new")
            os.replace(new, package / f"_{name}.so")
        return failed

    def follow(self, command: list[str]) -> str | None:
        """Run ninja and show where it is; the first error, or None."""
        lines = []
        environment = os.environ | {"NINJA_STATUS": "[%f/%t] "}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        with open_terminal() as terminal, subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
            for line in process.stdout:
                lines.append(line.rstrip())
                progress = line.startswith(("[", "ninja: no work"))
                print(lines[-1], file=sys.stdout if progress else sys.stderr, flush=True)
                if progress:
                    print(f"\r\033[K{lines[-1]}", end="", file=terminal, flush=True)
            print("\r\033[K", end="", file=terminal, flush=True)
        if process.returncode == 0:
            return None
        failed = next((i for i, line in enumerate(lines) if line.startswith("FAILED: ")), None)
        if failed is None:
            return "; ".join(lines[-3:])
        return failure(lines[failed + 1], lines[failed + 2 :])

    def call(self, command: list[str]) -> str | None:
        """Run a command; its error, or None."""
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        sys.stderr.write(done.stderr)
        return failure(shlex.join(command), done.stderr.splitlines()) if done.returncode else None


class Wheel(bdist_wheel):
    """A wheel for every Python that the package takes: the libraries call torch and no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def failure(command: str, output: list[str]) -> str:
    output = [line for line in output if not line.startswith(("[", "ninja: "))]
    errors = [line for line in output if "error" in line] or output[-3:]
    return f"`{command}` failed: {'; '.join(errors[:3])}"


def open_terminal():
    """The terminal of the person who waits: pip shows nothing of what a build prints before it ends."""
    try:
        return open(os.devnull if sys.stdout.isatty() else "/dev/tty", "w")
    except OSError:  # none, as in CI
        return open(os.devnull, "w")


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
setup(
    ext_modules=[Extension("minisora_kernels._kernels", sources=[])],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
