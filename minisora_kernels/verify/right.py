"""Is a kernel right here? The cases of one op, in a process of its own: a crash spoils that op alone.

Every case is run in float32 and bfloat16, one of an op in float16. Values and every gradient are held against float64
by the tolerance rule. What the kernel does not write shows as NaN. Its inputs and outputs lie in larger buffers, whose
margins must stay. The bits must be the same once more and beside other work. They must be the same without gradients
too, as in the first forward of a checkpoint. On a GPU a captured graph must give, on new inputs, the bits of a call.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..testing import assert_as_accurate
from .cases import Case, checked

MARGIN = 4096  # elements, on both sides
DRAWS = 8  # of a case, where the first fails: the largest of few errors is a matter of luck
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Refused(Exception):
    """The backend says beforehand that it cannot serve a case, which is no fault."""


class Guarded:
    """Tensors within larger buffers full of NaN. :meth:`check` finds what was written to a buffer beside its tensor."""

    def __init__(self) -> None:
        self._buffers: list[tuple[str, Tensor, Tensor, Tensor]] = []

    def empty(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        strides: Sequence[int] | None = None,
        offset: int = 0,
    ) -> Tensor:
        """By default contiguous. Its first element lies ``offset`` elements behind a multiple of 16 bytes."""
        strides = torch.empty(shape, device="meta").stride() if strides is None else strides
        count = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) if 0 not in shape else 0
        buffer = torch.empty_strided((count + offset + 2 * MARGIN,), (1,), dtype=dtype, device=device)
        buffer.fill_(float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max)
        place = tuple(shape), tuple(strides), MARGIN + offset
        own = torch.zeros(buffer.shape, dtype=torch.bool, device=device)
        own.as_strided(*place).fill_(True)
        self._buffers.append((name, buffer, buffer.clone(), own))
        return buffer.as_strided(*place)

    def check(self) -> None:
        for name, buffer, before, own in self._buffers:
            old, new = (tensor.view(torch.uint8).view(len(own), -1) for tensor in (before, buffer))
            (changed,) = torch.where((old != new).any(-1) & ~own)
            if len(changed):
                (inside,) = torch.where(own)
                where = "between the rows of"
                if not len(inside) or changed[-1] > inside[-1]:
                    where = "past the end of"
                elif changed[0] < inside[0]:
                    where = "before the start of"
                raise AssertionError(f"the kernel wrote {where} {name}")

    @contextlib.contextmanager
    def allocations(self, device: torch.device) -> Iterator[None]:
        """Within the block what kernels allocate is guarded too, in C++ as in Python."""
        library = torch.library.Library("aten", "IMPL")

        def new_empty(
            like: Tensor, size: Sequence[int], dtype=None, layout=None, device=None, pin_memory=None
        ) -> Tensor:
            return self.empty("a result or a buffer", size, dtype or like.dtype, device or like.device)

        def empty_like(
            like: Tensor, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None
        ) -> Tensor:
            model = torch.empty_strided(like.size(), like.stride(), device="meta")
            strides = torch.empty_like(model, memory_format=memory_format or torch.preserve_format).stride()
            what, dtype, device = "a result or a buffer", dtype or like.dtype, device or like.device
            return self.empty(what, like.shape, dtype, device, strides)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that aten has these already
            library.impl("new_empty", new_empty, device.type.upper())
            library.impl("empty_like", empty_like, device.type.upper())
        try:
            yield
        finally:
            library._destroy()


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def tuple_of(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def evaluate(
    case: Case, leaves: dict[str, Tensor], backend: str, rounded: Sequence[torch.dtype] = ()
) -> dict[str, Tensor]:
    """Outputs and gradients by name. Incoming gradients are fixed by the shapes, and rounded per output."""
    outputs = tuple_of(case.call(leaves, backend=backend))
    named = {f"output {i}": value for i, value in enumerate(outputs)}
    if case.differentiable:
        generator = torch.Generator().manual_seed(7)
        gradients = []
        for value, dtype in zip(outputs, rounded or [value.dtype for value in outputs], strict=True):
            gradient = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            gradients.append(gradient.to(value.device, dtype).to(value.dtype))
        wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
        found = torch.autograd.grad(outputs, [leaves[name] for name in wanted], gradients)
        named |= {f"gradient of {name}": value for name, value in zip(wanted, found, strict=True)}
    return {name: value.detach() for name, value in named.items()}


@contextlib.contextmanager
def busy(device: torch.device) -> Iterator[None]:
    """Within the block the device has other work: a second stream's, or a second thread's."""
    a = torch.ones(1024 if device.type == "cuda" else 128, 1024, device=device)
    if device.type == "cuda":
        with torch.cuda.stream(torch.cuda.Stream(device)):
            for _ in range(200):
                torch.mm(a, a)
        yield
        torch.cuda.synchronize(device)
        return
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            torch.mm(a, a.t())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def redrawn(case: Case) -> list[Case]:
    """The case with other numbers."""
    name = str(case).removesuffix(f" on {case.device}")
    found = [other for draw in range(1, DRAWS) for other in checked(draw) if str(other) == name]
    return [replace(other, call=case.call, device=case.device) for other in found]


def judged(case: Case, dtype: torch.dtype, kernel: dict[str, Tensor]) -> float:
    """The worst error over its bound of what a kernel computed. Raises AssertionError for one that is wrong."""
    reference = evaluate(case, case.leaves(dtype), "reference")
    leaves = case.leaves(dtype)
    wide = {name: leaf.detach().double().requires_grad_(leaf.requires_grad) for name, leaf in leaves.items()}
    rounded = [value.dtype for name, value in kernel.items() if name.startswith("output")]
    exact = evaluate(case, wide, "reference", rounded)
    worst = 0.0
    for name, value in kernel.items():
        parts = [value, reference[name], exact[name].double()]
        if case.has_nan:
            nan = parts[2].isnan()
            assert torch.equal(value.isnan(), nan), f"{name}: other values are NaN than should be"
            parts = [part.masked_fill(nan, 0) for part in parts]
        worst = max(worst, assert_as_accurate(name, *parts))
    return worst


def judged_again(case: Case, dtype: torch.dtype, backend: str, error: AssertionError) -> float:
    """The same of draws of other numbers; raises ``error`` if several of them fail too, or there are none."""
    found, failed = [], 0
    for other in redrawn(case):
        try:
            found.append(judged(other, dtype, evaluate(other, other.leaves(dtype), backend)))
        except AssertionError:
            failed += 1
    if failed > 1 or not found:
        raise error
    return max(found)


def check(case: Case, dtype: torch.dtype, backend: str) -> float:
    """The worst error over its bound. Raises AssertionError for a kernel that is wrong, Refused for a refusal."""
    device, guarded = torch.device(case.device), Guarded()
    leaves = case.leaves(dtype)
    inside = {}
    for name, leaf in leaves.items():
        inside[name] = guarded.empty(
            name, leaf.shape, leaf.dtype, device, leaf.stride(), int(leaf.storage_offset()) % 2
        )
        inside[name].copy_(leaf.detach())
        inside[name].requires_grad_(leaf.requires_grad)
    try:
        with guarded.allocations(device):
            kernel = evaluate(case, inside, backend)
    except ValueError as error:
        if "cannot serve this call" in str(error):
            raise Refused(str(error)) from error
        raise
    guarded.check()
    for name, leaf in leaves.items():
        assert same_bits(inside[name].detach(), leaf.detach()), f"{name}: the kernel changed its input"
    try:
        worst = judged(case, dtype, kernel)
    except AssertionError as error:
        worst = judged_again(case, dtype, backend, error)
    for what, beside in (("the second time", contextlib.nullcontext()), ("beside other work", busy(device))):
        with beside:
            again = evaluate(case, leaves, backend)
        for name, value in kernel.items():
            assert same_bits(value, again[name]), f"{name}: other bits {what}"
    with torch.no_grad():
        alone = tuple_of(case.call(leaves, backend=backend))
    for i, value in enumerate(alone):
        assert same_bits(kernel[f"output {i}"], value), f"output {i}: other bits without gradients"
    if device.type == "cuda":
        check_capture(case, dtype, backend)
    return worst


def check_capture(case: Case, dtype: torch.dtype, backend: str) -> None:
    """A captured call, replayed on new inputs, has the bits of a call. Not run on a GPU yet."""
    static, other = case.leaves(dtype), case.leaves(dtype)
    stream = torch.cuda.Stream(case.device)
    stream.wait_stream(torch.cuda.current_stream(case.device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            evaluate(case, static, backend)
    torch.cuda.current_stream(case.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    gradients: dict[str, Tensor] = {}
    # torch's own stream for captures is of the device that was current at the first one, which may be another.
    with torch.cuda.device(case.device), torch.cuda.graph(graph, stream=stream):
        outputs = tuple_of(case.call(static, backend=backend))
        ones = [torch.ones_like(value) for value in outputs]
        wanted = [name for name, leaf in static.items() if leaf.requires_grad]
        if case.differentiable:
            found = torch.autograd.grad(outputs, [static[name] for name in wanted], ones)
            gradients = dict(zip(wanted, found, strict=True))
    with torch.no_grad():
        for name, leaf in other.items():
            if leaf.dim() and not case.has_nan:
                leaf.copy_(leaf.flip(0))
            static[name].copy_(leaf)
    with torch.cuda.device(case.device):
        graph.replay()
    expected = tuple_of(case.call(other, backend=backend))
    for i, (value, captured) in enumerate(zip(expected, outputs, strict=True)):
        assert same_bits(value.detach(), captured.detach()), f"output {i}: other bits in a captured graph"
    if case.differentiable:
        found = torch.autograd.grad(expected, [other[name] for name in wanted], [torch.ones_like(v) for v in expected])
        for name, value in zip(wanted, found, strict=True):
            assert same_bits(value, gradients[name]), f"gradient of {name}: other bits in a captured graph"


def lacks_memory(error: Exception) -> bool:
    """Whether there was too little memory, on the device or on the host."""
    said = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in said)


def say(kind: str, **fields: Any) -> None:
    """A line for the process that started this one: a case that begins, its result, or that all is done."""
    print(json.dumps({"kind": kind, **fields}), flush=True)


def selected(op: str, part: tuple[int, int], device: torch.device, quick: bool) -> Iterator[tuple[Case, torch.dtype]]:
    """The cases of a part of an op, each with its dtypes; the first one in float16 too, unless ``quick``."""
    cases = [case for case in checked() if case.op == op][part[0] :: part[1]]
    if backends.DEVICES["triton"] == "cpu":  # which takes milliseconds for a program
        cases = [case for case in cases if max(tensor.numel() for tensor in case.tensors.values()) <= 20_000]
    for i, case in enumerate(cases):
        for dtype in DTYPES[:2] if quick or i else DTYPES:
            yield replace(case, device=str(device)), dtype
    if cases and device.type == "cuda" and torch.cuda.device_count() > 1:  # from the device that is the current one
        other = (device.index + 1) % torch.cuda.device_count()
        yield replace(cases[0], name=f"{cases[0].name} on cuda:{other}", device=f"cuda:{other}"), torch.bfloat16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--op", required=True)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1))
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--precision", default="highest")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_float32_matmul_precision(options.precision)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # noqa: B010 - a property that mypy misses
    warnings.simplefilter("ignore")
    for case, dtype in selected(options.op, options.part, options.device, options.quick):
        line: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
        say("case", case=f"{case} {line['dtype']}")
        try:
            line["error"] = check(case, dtype, options.backend)
        except Refused as reason:
            line["refused"] = str(reason)
        except Exception as error:
            # But for a lack of memory, which may be other processes', it is the kernel's fault.
            line["undecided" if lacks_memory(error) else "wrong"] = f"{case.name}: {str(error) or type(error).__name__}"
        say("result", **line)
    say("done")


if __name__ == "__main__":
    main()
