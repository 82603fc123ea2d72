"""The Triton kernels, compiled ahead of time for every architecture, are those of the committed record."""

from __future__ import annotations

import copy
import importlib.util
import json
import re

import pytest

from bench import aot
from minisora_kernels import backends

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(backends.INTERPRETED, reason="the interpreter compiles nothing"),
]
RECORD = json.loads(aot.RECORD.read_text()) if aot.RECORD.exists() else {}


def test_no_kernel_spills_grew_or_is_missing():
    """Compiles them all, which takes minutes."""
    assert aot.complaints(aot.everything(), RECORD) == []


def test_the_record_has_every_op_and_architecture_and_passes_its_own_rules():
    from minisora_kernels.__main__ import ops

    assert {int(sm.removeprefix("sm_")) for sm in RECORD["kernels"]} == set(aot.ARCHITECTURES)
    for kernels in RECORD["kernels"].values():
        assert {name.split()[0] for name in kernels} == set(ops())
    assert aot.complaints(RECORD, RECORD) == []
    assert aot.RECORD.read_text() == aot.written(RECORD)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spilled": 8}, "sm_90 adaln bfloat16 _fwd 0: spills 8 bytes a thread"),
        ({"shared": 300_000}, "sm_90 adaln bfloat16 _fwd 0: 300000 bytes of shared memory, there are 232448"),
        ({"registers": 255}, r"sm_90 adaln bfloat16 _fwd 0: registers grew from \d+ to 255"),
    ],
)
def test_what_got_worse_is_named(change, complaint):
    new = copy.deepcopy(RECORD)
    new["kernels"]["sm_90"]["adaln bfloat16 _fwd 0"] |= change
    assert any(re.fullmatch(complaint, found) for found in aot.complaints(new, RECORD))


def test_a_kernel_too_many_or_too_few_is_named():
    new = copy.deepcopy(RECORD)
    new["kernels"]["sm_90"]["adaln bfloat16 _new 0"] = new["kernels"]["sm_90"].pop("adaln bfloat16 _fwd 0")
    assert aot.complaints(new, RECORD) == [
        "sm_90 adaln bfloat16 _new 0: not in the record",
        "sm_90 adaln bfloat16 _fwd 0: in the record, but nothing launches it",
    ]
    assert aot.complaints(new | {"triton": "of another day"}, RECORD) == []


def test_occupancy_is_bound_by_what_runs_out_first():
    ampere = aot.ARCHITECTURES[80]
    assert ampere.occupancy(warps=4, registers=32, shared=0) == 1.0
    assert ampere.occupancy(warps=4, registers=128, shared=0) == 0.25
    assert ampere.occupancy(warps=8, registers=32, shared=80 * 1024) == 0.25
    assert ampere.occupancy(warps=1, registers=32, shared=0) == 0.5
