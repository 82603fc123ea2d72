"""Everything that a GPU is needed for, in one command: ``python -m bench.gpu``. Not run on a GPU yet.

    1. the tests of ops and of models with kernels, on the GPU, with the Triton kernels;
    2. the values of small shapes again under compute-sanitizer, if it is there (it comes with the CUDA toolkit);
    3. every bench against eager PyTorch and torch.compile, with the ceilings measured in the same run.

The record goes to ``bench/results/<gpu>/<name>.json``, with its plots; what the tests and the sanitizer said beside it.
Exit status: that of the first step that failed; the others run all the same.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys

import torch

from bench import record

TESTS = ["tests/test_ops.py", "tests/test_grn.py", "tests/test_model_kernels.py"]
SMALL = "values and gradients and float32 and not long and not model-width and not clip"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="default", help="of the record")
    parser.add_argument("-k", default="", help="only the benches that this expression selects")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    folder = record.path_of(record.machine(torch.device("cuda")), options.name).parent
    folder.mkdir(parents=True, exist_ok=True)

    pytest = [sys.executable, "-m", "pytest", "-q"]
    steps = {"tests": [*pytest, *TESTS]}
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on PATH: no step 2")
    else:
        check = [sanitizer, "--tool", "memcheck", "--error-exitcode", "1", "--target-processes", "all"]
        steps["sanitizer"] = [*check, *pytest, TESTS[0], "-k", SMALL]
    bench = [*pytest, "bench", "--benchmark-only", "--device", "cuda", "--save", options.name, "--save-over"]
    steps["benches"] = [*bench, "-k", options.k] if options.k else bench
    status = 0
    for name, command in steps.items():
        print(f"{name}: {' '.join(command)}", flush=True)
        # The sanitizer sees no access out of bounds that lands in what torch's allocator holds for itself.
        environment = os.environ | {
            "MINISORA_TEST_DEVICE": "cuda",
            "PYTORCH_NO_CUDA_MEMORY_CACHING": str(int(name == "sanitizer")),
        }
        done = subprocess.run(command, cwd=record.ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        (folder / f"{options.name}-{name}.txt").write_text(done.stdout)
        print(done.stdout[-4000:], flush=True)
        status = status or done.returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
