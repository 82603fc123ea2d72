"""``make op OP=adaln``: build for this CPU, test one op on every backend at hand and in the interpreter, quick bench.

The interpreter's tests run beside the others. There only values and gradients are tested, without float16; `make
check-gpu-code` runs every test in the interpreter. The tests there read Python alone: an edit of C++ does not run them
again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:warnings"]


class Step:
    """A command that runs, with what it prints kept until it is asked for."""

    def __init__(self, name: str, command: list[str], **environment: str) -> None:
        self.name, self.start = name, time.monotonic()
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the step
        streams = dict(stdout=self.output, stderr=subprocess.STDOUT)
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, **streams)

    def passes(self) -> bool:
        code = self.process.wait()
        self.output.seek(0)
        print(f"== {self.name}: {'passed' if code == 0 else 'FAILED'}, {time.monotonic() - self.start:.0f} s")
        print(self.output.read().strip(), flush=True)
        return code == 0


def python_sources() -> str:
    """A digest of what the tests in the interpreter read."""
    digest = hashlib.sha256(importlib.metadata.version("triton").encode())
    for path in sorted(path for room in ("minisora_kernels", "tests") for path in (ROOT / room).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Interpreted:
    """The tests of an op in the interpreter, which run from now on; not if they passed on the same Python files."""

    def __init__(self, op: str, tests: list[str]) -> None:
        self.step, self.passed_on = None, ROOT / "build" / "op" / f"{op}.interpreted"
        if not (ROOT / "minisora_kernels" / "triton" / f"{op}.py").exists():
            print(f"{op} has no Triton kernel: nothing runs in the interpreter")
            return
        if importlib.util.find_spec("triton") is None:
            print("Triton is not installed: nothing runs in its interpreter")
            return
        self.sources = python_sources()
        if self.passed_on.exists() and self.passed_on.read_text() == self.sources:
            print("== tests in the interpreter: passed before; no Python file has changed since")
            return
        chosen = [*tests, "-k", "values_and_gradients and not torch.float16"]
        environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self.step = Step("tests in the interpreter", [*PYTEST, *chosen], **environment)

    def passes(self) -> bool:
        if self.step is None:
            return True
        passed = self.step.passes()
        if passed:
            self.passed_on.parent.mkdir(parents=True, exist_ok=True)
            self.passed_on.write_text(self.sources)
        return passed


def main() -> int:
    ops = sorted(path.stem for path in (ROOT / "minisora_kernels" / "ops").glob("[!_]*.py"))
    if len(sys.argv) != 2 or sys.argv[1] not in ops:
        print(f"usage: make op OP=name; name may be {', '.join(ops)}", file=sys.stderr)
        return 2
    op = sys.argv[1]
    tests = ["tests/ops/test_ops.py", "--op", op]
    # The build never fails as a command; a library that is not there does, where it should be.
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    check = "import sys; from minisora_kernels import backends; sys.exit(backends.unavailable('cpu'))"
    passed = Step("build", build, MINISORA_CPU="native").passes()
    passed = passed and subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
    interpreted = Interpreted(op, tests)  # not before: the package refuses a library of other sources
    native = Step("tests", [*PYTEST, f"tests/ops/test_{op}.py", *tests]) if passed else None
    passed = interpreted.passes() and passed  # before the bench, which wants a core
    if native is not None:
        bench = Step("quick bench", [*PYTEST, f"bench/ops/bench_{op}.py", "--benchmark-only", "--quick"])
        passed = bench.passes() and passed
        passed = native.passes() and passed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
