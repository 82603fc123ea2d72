"""A kernel has one key in Triton's cache, whatever ran before: another process does not compile it again."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from bench.harness.record import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

KEYS = """
import importlib, sys
from pathlib import Path
from triton.runtime.jit import JITFunction
import minisora_kernels.triton as package
from minisora_kernels.triton._launch import give_key

stems = sorted(path.stem for path in Path(package.__file__).parent.glob("*.py") if path.stem != "__init__")
modules = [importlib.import_module(f"minisora_kernels.triton.{stem}") for stem in stems]
functions = {f"{f.__module__}.{f.__name__}": f for m in modules for f in vars(m).values() if isinstance(f, JITFunction)}
functions = {name: function for name, function in functions.items() if name.startswith("minisora_kernels")}
for name in sorted(functions, reverse=sys.argv[1] == "backwards"):
    (give_key if sys.argv[2] == "ours" else lambda function: function.cache_key)(functions[name])
for name in sorted(functions):
    print(name, functions[name].cache_key)
"""


def keys(order: str, whose: str) -> dict[str, str]:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", KEYS, order, whose], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.slow
def test_keys_do_not_depend_on_the_order():
    forwards = keys("forwards", "ours")
    assert len(forwards) > 40 and forwards == keys("backwards", "ours")


@pytest.mark.slow
def test_triton_alone_makes_them_depend_on_it():
    """When this fails, ``give_key`` can go."""
    assert keys("forwards", "triton") != keys("backwards", "triton")
