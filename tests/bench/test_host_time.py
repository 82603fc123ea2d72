"""Launches through the real path over a stub of the driver: what reaches it, and what becomes of their times."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minisora_kernels import backends

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(backends.INTERPRETED, reason="the interpreter launches nothing"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
]

# In a process of its own, for Triton keeps one driver a process. What every launch hands to the driver is noted: the
# grid, the threads of a block, and the parameters, as the signature of the compiled kernel has them.
PROBE = """
import ctypes, json, sys
import torch
from triton.compiler.compiler import CompiledKernel
from bench import host_time

class Config(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in ("x", "y", "z", "threads", "threads_y", "threads_z", "shared")]

Note = ctypes.CFUNCTYPE(None, ctypes.POINTER(Config), ctypes.POINTER(ctypes.c_void_p))
TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
seen, compiled = [], []

def note(config, parameters):
    signature = [kind for kind in compiled[-1].src.signature.values() if kind != "constexpr"]
    values = [ctypes.cast(parameters[i], ctypes.POINTER(TYPES.get(kind, ctypes.c_uint64)))[0]
              for i, kind in enumerate(signature)]
    c = config[0]
    seen.append([compiled[-1].name, [c.x, c.y, c.z, c.threads, c.shared], signature, values])

of_triton = CompiledKernel.run
CompiledKernel.run = property(lambda self: (compiled.append(self), of_triton.fget(self))[1])
"""


def probe(body: str) -> list:
    done = subprocess.run([sys.executable, "-c", PROBE + body], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_later_launches_hand_over_what_the_first_did():
    """Through Triton, then twice straight to the compiled kernel, with the same tensors and other ones."""
    first, second, third, others, addresses = probe("""
with host_time.stubbed() as stub:
    callback = Note(note)
    ctypes.c_void_p.in_dll(stub, "stub_on_launch").value = ctypes.cast(callback, ctypes.c_void_p).value
    launches = torch.ops.minisora_triton
    x, c = torch.randn(2, 24, 40, dtype=torch.bfloat16), torch.randn(2, 240)
    shift, scale, gate = c.unflatten(1, (1, -1)).chunk(6, -1)[1:4]
    weight = torch.ones(40)
    def call(x):
        seen.clear()
        y, mean, rstd = launches.adaln_fwd(x, shift, scale, weight, None, None, True, 1e-3, torch.float32)
        asked = (True, shift.dtype, 1, scale.dtype, 1, weight.dtype, None)
        grads = launches.adaln_bwd(y, x, scale, weight, None, mean, rstd, None, True, *asked)
        at = [t.data_ptr() for t in (x, shift, scale, weight, y, mean, rstd, *grads[:4])]
        return list(seen), at
    _, here = kept = call(x)
    print(json.dumps([kept[0], (second := call(x))[0], (third := call(x))[0], call(x.clone())[0], second[1]]))
""")
    names = [launch[0] for launch in first]
    assert names == ["_fwd", "_bwd", "_add_up_all"]
    for again in (second, third, others):
        assert [launch[:3] for launch in again] == [launch[:3] for launch in first]
        for one, other in zip(first, again, strict=True):
            pointers = [kind.startswith("*") for kind in one[2]]
            numbers = [[v for v, p in zip(launch[3], pointers, strict=True) if not p] for launch in (one, other)]
            assert numbers[0] == numbers[1]
    forward = [value for kind, value in zip(second[0][2], second[0][3], strict=True) if kind.startswith("*")]
    backward = [value for kind, value in zip(second[1][2], second[1][3], strict=True) if kind.startswith("*")]
    x, shift, scale, weight, y, mean, rstd, dx, dshift, dscale, dweight = addresses
    assert forward == [x, shift, scale, weight, y, mean, rstd]
    assert backward[:-1] == [y, x, scale, weight, mean, rstd, dx, dshift, dscale, dweight]
    last = [value for kind, value in zip(second[2][2], second[2][3], strict=True) if kind.startswith("*")]
    assert last[0] == backward[-1] and set(last[1:]) <= {dshift, dscale, dweight}


def test_addresses_that_are_not_aligned_have_a_kernel_of_their_own():
    kernels = probe("""
with host_time.stubbed() as stub:
    x = torch.randn(2 * 24 * 40 + 8, dtype=torch.bfloat16)
    branch, gate = torch.randn(2, 24, 40, dtype=torch.bfloat16), torch.randn(2, 1, 40)
    used = []
    for shift in (0, 0, 1, 8, 1, 0):
        compiled.clear()
        torch.ops.minisora_triton.gate_residual_fwd(x[shift:shift + 1920].view(2, 24, 40), branch, gate, None, None)
        used.append(compiled[-1].hash)
    print(json.dumps(used))
""")
    aligned, again, odd, eight, odd_again, back = kernels
    assert aligned == again == eight == back and odd == odd_again != aligned


def test_another_function_in_the_place_of_tritons_gets_every_launch():
    assert probe("""
from unittest.mock import patch
from triton.runtime.jit import JITFunction
run, through = JITFunction.run, []
with host_time.stubbed() as stub:
    x, gate = torch.randn(2, 24, 40), torch.randn(2, 1, 40)
    call = lambda: torch.ops.minisora_triton.gate_residual_fwd(x, x.clone(), gate, None, None)
    call(), call()
    replaced = lambda self, *args, **options: (through.append(self.__name__), run(self, *args, **options))[1]
    with patch.object(JITFunction, "run", replaced):
        call(), call()
    call()
print(json.dumps(through))
""") == ["_fwd", "_fwd"]


def test_so_does_one_that_stood_there_before_the_kernels_were_imported():
    """As in bench/aot.py, on tensors without memory."""
    assert probe("""
from unittest.mock import patch
from triton.runtime.jit import JITFunction
assert not any(name.startswith("minisora_kernels.triton") for name in sys.modules)
through = []
with patch.object(JITFunction, "run", lambda self, *args, **options: through.append(self.__name__)):
    from minisora_kernels.triton.gate_residual import gate_residual_fwd
    x, gate = torch.empty(2, 24, 40, device="meta"), torch.empty(2, 1, 40, device="meta")
    gate_residual_fwd(x, x, gate, None, None), gate_residual_fwd(x, x, gate, None, None)
print(json.dumps(through))
""") == ["_fwd", "_fwd"]


CALL = {"launches": 3, "us": 100.0, "ratio": 20.0}
RECORD = {
    "cpu": "0",
    "torch": "1",
    "triton": "2",
    "bare": 5.0,
    "calls": {"adaln": {"fwd": CALL, "fwd+bwd": dict(CALL)}},
}


def changed(**change: float) -> dict:
    new = copy.deepcopy(RECORD)
    new["calls"]["adaln"]["fwd+bwd"] |= change
    return new


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ratio": 30.1}, "adaln fwd+bwd: 30.1 bare launches, the record has 20.0"),
        ({"launches": 4}, "adaln fwd+bwd: 4 launches, the record has 3"),
        ({"ratio": 29.9, "us": 900.0}, None),
        ({"launches": 2, "ratio": 1.0}, None),
    ],
)
def test_a_launcher_that_got_slower_is_named(change: dict, text: str | None):
    from bench import host_time

    assert host_time.complaints(changed(**change), RECORD) == ({"adaln": [text]} if text else {})
    for what in ("cpu", "torch", "triton"):  # times are its own; launches are not
        other = changed(**change) | {what: "3"}
        assert host_time.complaints(other, RECORD) == ({"adaln": [text]} if "launches" in change and text else {})


def test_noise_does_not_stay_and_slowness_does():
    from bench import host_time

    measured: list[list[str]] = []

    def measure(*ratios: float):
        left = list(ratios)

        def once(names: list[str]) -> dict:
            measured.append(names)
            return changed(ratio=left.pop(0))

        return once

    assert host_time.checked(measure(40.0, 36.0, 21.0), RECORD) == []
    assert measured == [list(host_time.shapes()), ["adaln"], ["adaln"]]
    wrong = host_time.checked(measure(40.0, 36.0, 38.0, 37.0), RECORD)
    assert wrong == ["adaln fwd+bwd: 36.0 bare launches, the record has 20.0"]


@pytest.mark.slow
def test_no_op_launches_more_or_takes_longer_than_the_record_says():
    """Measures them all: half a minute."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.host_time"], cwd=ROOT, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_the_record_has_every_op():
    from bench import host_time
    from minisora_kernels.__main__ import ops

    record = json.loads(host_time.RECORD.read_text())
    assert set(record["calls"]) == set(host_time.shapes())
    assert {host_time.shapes()[name][0] for name in record["calls"]} == set(ops())
    assert host_time.complaints(record, record) == {}
