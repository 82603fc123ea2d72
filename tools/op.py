"""``make op OP=adaln``: build for this CPU, test one op on every backend at hand and in the interpreter, quick bench.

Two cores do it in about the time of one: the interpreter's tests need no compiler, so they run beside the build. There
only values and gradients are tested, without float16; `make check-gpu-code` runs every test in the interpreter.
"""

from __future__ import annotations

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


def main() -> int:
    ops = sorted(path.stem for path in (ROOT / "minisora_kernels" / "ops").glob("[!_]*.py"))
    if len(sys.argv) != 2 or sys.argv[1] not in ops:
        print(f"usage: make op OP=name; name may be {', '.join(ops)}", file=sys.stderr)
        return 2
    op = sys.argv[1]
    tests = ["tests/ops/test_ops.py", "--op", op]
    interpreted = None
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: nothing runs in its interpreter")
    elif (ROOT / "minisora_kernels" / "triton" / f"{op}.py").exists():
        chosen = [*tests, "-k", "values_and_gradients and not torch.float16"]
        interpreted = Step("tests in the interpreter", [*PYTEST, *chosen], TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    # The build never fails as a command; a library that is not there does, where it should be.
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    check = "import sys; from minisora_kernels import backends; sys.exit(backends.unavailable('cpu'))"
    passed = Step("build", build, MINISORA_CPU="native").passes()
    passed = passed and subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
    if passed:
        native = Step("tests", [*PYTEST, f"tests/ops/test_{op}.py", *tests])
        passed = (interpreted is None or interpreted.passes()) and passed  # before the bench, which wants a core
        bench = Step("quick bench", [*PYTEST, f"bench/ops/bench_{op}.py", "--benchmark-only", "--quick"])
        passed = bench.passes() and passed
        passed = native.passes() and passed
    elif interpreted is not None:
        interpreted.passes()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
