"""How a bench is run: values first, then counts, then every column timed in turns.

A case is op x shape x dtype x direction. Its columns:

- ``eager``: the op's reference backend, the best plain PyTorch for training;
- a named form that code bases write instead, where they commonly do;
- ``compile``: ``torch.compile`` of the reference, static shapes, one graph;
- ``ours``: the backend that is chosen automatically;
- ``ours in compile``: ``torch.compile`` of the same call; forward and backward of ops only, and not with ``--quick``.

``fwd`` runs without gradients (and is compiled so); ``fwd+bwd`` computes the gradient of every input that is not a
constant, from dense random upstream gradients that are made once.

Before anything is timed, every column's values and gradients are compared with the reference in float64 (for models in
half precision, in float32) on the same rounded inputs, and the bench fails if they are wrong. Ours must pass the rule
of ``minisora_kernels/testing.py``. The others need only compute the same thing: their error, in the root mean square,
must stay below sqrt(eps) of the result.
(Inductor sums long columns one number after the other and misses the rule in float32, also around our kernels.)

The compilation of a case takes 1 to 9 seconds for an op and up to a minute for a model (two cores, cold cache), which
is why the models are few and only ops are timed as ``ours in compile``.

A round times one sample of each column, in rotated order; short calls are repeated within a sample. Ratios are taken
per round. On a GPU shapes are larger (``on_device`` of bench/harness/shapes.py). These times are the device's alone;
the host's are a part of the record for themselves: see bench/harness/clock.py. A call takes the longer of the two.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.harness.clock import Clock
from bench.harness.counters import InductorBytes
from bench.harness.shapes import on_device
from minisora_kernels import use_backend
from minisora_kernels.counters import Counter, saved_bytes
from minisora_kernels.testing import assert_as_accurate

Call = Callable[[dict[str, Any]], Any]  # of tensors by name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FWD, BOTH = "fwd", "fwd+bwd"

SAMPLE_SECONDS = 5e-4
MOST_ROUNDS = 41
HOST_ROUNDS = 5
LONG_SECONDS = 1.0  # a call that takes longer is timed in three rounds
# Of a longer tensor every k-th element is compared, so that about this many are.
COMPARED = 1 << 22


@dataclass
class Problem:
    """A call of an op (or model) and its inputs, in one dtype.

    Attributes:
        inputs: tensors by name.
        call: runs it on such tensors, through the public ops.
        constants: names of inputs that get no gradient.
        written: name and call of another form that code bases write.
        slow_backward: the written form takes too long to be timed with its backward.
        unread: inputs whose values the backward does not need.
        aliased: inputs whose gradient is the upstream gradient itself.
        model: a whole model. An error of one op runs through all others there, and hundreds of gradients are compared,
            one of which may miss the rule by chance: it is held against all gradients together, each scaled to about
            the same size. ``ours in compile`` is left out, for it compiles for half a minute.
    """

    inputs: dict[str, Tensor]
    call: Call
    constants: Sequence[str] = ()
    written: tuple[str, Call] | None = None
    slow_backward: bool = False
    unread: Sequence[str] = ()
    aliased: Sequence[str] = ()
    model: bool = False

    def __post_init__(self) -> None:
        for name in self.gradient_names:
            self.inputs[name].requires_grad_()

    @property
    def gradient_names(self) -> list[str]:
        return [name for name in self.inputs if name not in self.constants]

    def widened(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same rounded inputs in a wider type."""
        return {
            name: tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in self.inputs.items()
        }

    def bytes(self, outputs: Iterable[Tensor], direction: str) -> int:
        """What must be read and written if every tensor passes once through the forward and once the backward."""
        sizes = {name: tensor.nbytes for name, tensor in self.inputs.items()}
        results = sum(value.nbytes for value in outputs)
        total = sum(sizes.values()) + results
        if direction == BOTH:
            total += results + sum(size for name, size in sizes.items() if name not in self.unread)
            total += sum(sizes[name] for name in self.gradient_names if name not in self.aliased)
        return total


class Random:
    """``random(*shape)``: normal, the same on every machine, rounded to ``dtype``."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator).mul_(scale).add_(shift)
        return values.to(self.device, self.dtype)


Make = Callable[[Any, torch.dtype, torch.device], Problem]


def cases(shapes: Sequence[Any], directions: Sequence[str] = (BOTH, FWD)) -> pytest.MarkDecorator:
    """Parametrise a bench by ``shape``, ``dtype`` and ``direction``; ids are what ``-k`` selects from.

    The directions of a shape follow one another, for they share the float64 oracle.
    """
    return pytest.mark.parametrize(
        ("shape", "dtype", "direction"),
        [
            pytest.param(shape, dtype, direction, id=f"{shape.name} {dtype} {direction}")
            for shape in shapes
            for dtype in shape.dtypes
            for direction in directions
        ],
    )


def tuple_of(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def ours_on(device: torch.device) -> str | None:
    """The backend of our columns: a GPU's automatic choice is the reference until the kernels have been run on one."""
    return "triton" if device.type == "cuda" else None


def on_backend(backend: str | None, call: Call) -> Call:
    def chosen(inputs: dict[str, Tensor]) -> Any:
        with use_backend(backend):
            return call(inputs)

    return chosen


def thin(tensor: Tensor) -> Tensor:
    step = tensor.numel() // COMPARED
    if step <= 1:
        return tensor.detach()
    return tensor.detach().flatten()[:: step | 1].clone()  # an odd step visits every channel


def evaluate(
    problem: Problem, call: Call, direction: str, upstream: Sequence[Tensor], inputs: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Outputs and, with the backward, gradients, by name; long ones thinned out for the comparison."""
    inputs = problem.inputs if inputs is None else inputs
    with torch.set_grad_enabled(direction == BOTH):
        outputs = tuple_of(call(inputs))
    results = {f"output {i}": thin(value) for i, value in enumerate(outputs)}
    if direction == BOTH:
        gradients = torch.autograd.grad(outputs, [inputs[name] for name in problem.gradient_names], upstream)
        results |= {f"gradient of {name}": thin(g) for name, g in zip(problem.gradient_names, gradients, strict=True)}
    return results


@dataclass
class Oracle:
    """What is right for a problem, how near the reference comes, and the FLOPs of its products.

    Right is the reference in float64; for a model in half precision, which takes long, in float32, whose unit of
    rounding is 2^-16 of bfloat16's.
    """

    problem: Problem
    direction: str
    upstream: list[Tensor] = field(default_factory=list)
    exact: dict[str, Tensor] = field(default_factory=dict)
    reference: dict[str, Tensor] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    moved: int = 0

    def __post_init__(self) -> None:
        problem, reference = self.problem, on_backend("reference", self.problem.call)
        dtype = next(tensor.dtype for tensor in problem.inputs.values() if tensor.is_floating_point())
        generator = torch.Generator().manual_seed(1)
        wide = torch.float32 if problem.model and dtype != torch.float32 else torch.float64
        upstream: list[Tensor] = []

        def exact(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
            outputs = tuple_of(reference(inputs))
            for value in outputs:  # a scalar is a loss
                gradient = torch.randn(value.shape, generator=generator) if value.dim() else torch.ones(())
                self.upstream.append(gradient.to(value.device, dtype))
                upstream.append(self.upstream[-1].to(wide))
            return outputs

        def counted(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
            outputs = tuple_of(reference(inputs))
            self.flops[FWD] = counter.flops
            return outputs

        found = evaluate(problem, exact, self.direction, upstream, problem.widened(wide))
        self.exact = {name: value.double() for name, value in found.items()}
        with Counter() as counter:
            self.reference = evaluate(problem, counted, self.direction, self.upstream)
        self.flops[BOTH], self.moved = counter.flops, counter.moved
        self.check("eager", self.reference)

    def check(self, column: str, results: dict[str, Tensor]) -> None:
        """Raises AssertionError if the column's results are wrong."""
        together: list[list[Tensor]] = []
        for key, value in results.items():
            name, reference, exact = f"{column}: {key}", self.reference[key], self.exact[key]
            if column == "ours" and self.problem.model and key.startswith("gradient"):
                unit = 2.0 ** -round(math.log2(exact.abs().max().item() or 1.0))  # a power of two: exact in any dtype
                together.append([(tensor * unit).flatten() for tensor in (value, reference, exact)])
            elif column == "ours":
                assert_as_accurate(name, value, reference, exact)
                continue
            error, size = ((tensor.square().mean().sqrt().item()) for tensor in (value.double() - exact, exact))
            bound = torch.finfo(value.dtype).eps ** 0.5 * size
            assert error <= bound, f"{name} ({value.dtype}): rms error {error:.3e} > {bound:.3e}"
        if together:
            assert_as_accurate(f"{column}: all gradients", *(torch.cat(part) for part in zip(*together, strict=True)))


class Session:
    """What the cases of one run share: device, options, the last oracle, and the records they leave."""

    def __init__(self, device: torch.device, *, quick: bool = False) -> None:
        self.device, self.quick = device, quick
        self.clock = Clock(device)
        self.seconds, self.fewest_rounds = (0.5, 3) if quick else (1.0, 5)
        self.records: list[dict[str, Any]] = []
        self._oracle: tuple[Any, Oracle] | None = None

    def oracle(self, make: Make, shape: Any, dtype: str, direction: str) -> Oracle:
        key = (make, shape, dtype)
        if self._oracle is not None and self._oracle[0] == key and self._oracle[1].direction in (direction, BOTH):
            return self._oracle[1]
        self._oracle = None  # frees its memory first
        self._oracle = key, Oracle(make(shape, DTYPES[dtype], self.device), direction)
        return self._oracle[1]

    def columns(self, problem: Problem, direction: str) -> dict[str, Call]:
        calls = {"eager": on_backend("reference", problem.call)}
        if problem.written is not None and not (problem.slow_backward and direction == BOTH):
            calls[problem.written[0]] = on_backend("reference", problem.written[1])
        compiled = torch.compile(problem.call, dynamic=False, fullgraph=True)
        calls["compile"] = on_backend("reference", compiled)
        ours = ours_on(self.device)
        calls["ours"] = on_backend(ours, problem.call)
        if direction == BOTH and not self.quick and not problem.model:
            calls["ours in compile"] = on_backend(ours, compiled)
        return calls

    def run(self, benchmark: Any, op: str, make: Make, shape: Any, dtype: str, direction: str) -> None:
        """Verify, count, time, and append to ``records``; with ``--benchmark-disable`` only verify.

        Raises:
            AssertionError: a column whose values or gradients are wrong.
        """
        torch._dynamo.reset()
        release_memory()
        shape = on_device(shape, self.device)
        oracle = self.oracle(make, shape, dtype, direction)
        problem, calls = oracle.problem, self.columns(oracle.problem, direction)
        record: dict[str, Any] = {"op": op, "shape": shape.name, "dtype": dtype, "direction": direction}
        counters: dict[str, Any] = {"ours": Counter, "compile": InductorBytes}
        moved = {"eager": oracle.moved}
        for name, call in calls.items():
            if name == "eager":
                continue
            with counters.get(name, nullcontext)() as counter:
                results = evaluate(problem, call, direction, oracle.upstream)
            oracle.check(name, results)
            if counter is not None:
                moved[name] = counter.moved
            if name == "ours":
                record["kernels"] = sorted(counter.kernels)
        if direction == BOTH:
            leaves = list(problem.inputs.values())
            record["moved"] = moved
            record["saved"] = {
                name: saved_bytes(partial(call, problem.inputs), leaves)
                for name, call in calls.items()
                if name != "ours in compile"
            }
        with torch.compiler.set_stance("fail_on_recompile"):
            samples = self.sample(benchmark, self.timed(oracle, calls, direction))
            host = {} if benchmark.disabled else self.host(self.timed(oracle, calls, direction))
        if benchmark.disabled:
            return
        record |= summary(samples) | host
        record["bytes"] = problem.bytes(oracle.upstream, direction)
        record["flops"] = oracle.flops[direction]
        if self.device.type == "cuda":
            record["peak"] = {name: peak_bytes(call) for name, call in self.timed(oracle, calls, direction).items()}
        ours = record["columns"]["ours"]["median"]
        benchmark.group = op
        record |= {"gb_per_s": record["bytes"] / ours / 1e9, "gflop_per_s": record["flops"] / ours / 1e9}
        benchmark.extra_info.update(record)
        self.records.append(record)

    def timed(self, oracle: Oracle, calls: dict[str, Call], direction: str) -> dict[str, Callable[[], Any]]:
        inputs = oracle.problem.inputs
        wanted = [inputs[name] for name in oracle.problem.gradient_names]

        def forward(call: Call) -> None:
            with torch.no_grad():
                call(inputs)

        def both(call: Call) -> None:
            torch.autograd.grad(tuple_of(call(inputs)), wanted, oracle.upstream)

        run = both if direction == BOTH else forward
        return {name: partial(run, call) for name, call in calls.items()}

    def sample(self, benchmark: Any, functions: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
        """Seconds a call, by column and round; pytest-benchmark's own statistics are those of samples of ``ours``."""
        clock = self.clock
        samples: dict[str, list[float]] = {name: [] for name in functions}
        ours = clock(functions["ours"])
        calls, rounds = dict.fromkeys(functions, 1), self.fewest_rounds if ours < LONG_SECONDS else 3
        if ours * rounds < self.seconds:  # else there is no time for more
            once = {name: ours if name == "ours" else clock(function) for name, function in functions.items()}
            calls = {name: max(1, math.ceil(SAMPLE_SECONDS / seconds)) for name, seconds in once.items()}
            cost = sum(seconds * calls[name] for name, seconds in once.items())
            rounds = min(max(rounds, int(self.seconds / cost)), MOST_ROUNDS)
        others = [name for name in functions if name != "ours"]

        def measure(name: str) -> None:
            samples[name].append(clock(functions[name], calls[name]))

        def setup() -> None:
            first = len(samples["ours"]) % len(others)
            for name in others[first:] + others[:first]:
                measure(name)

        benchmark.pedantic(measure, ("ours",), setup=setup, rounds=rounds)
        return samples

    def host(self, functions: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        """On a GPU ``host``: per column the seconds that the host takes for a call. Elsewhere nothing."""
        if self.device.type != "cuda":
            return {}
        rounds = [{name: self.clock.host(function) for name, function in functions.items()} for _ in range(HOST_ROUNDS)]
        return {"host": {name: spread([each[name] for each in rounds]) for name in functions}}


def release_memory() -> None:
    """Hand what earlier cases freed back to the system: glibc's heap, in pieces after many compilations, keeps it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def peak_bytes(function: Callable[[], Any]) -> int:
    """Peak memory of torch on the GPU during a call."""
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median, "q1": first, "q3": third}


def summary(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Per column the seconds of a call, and per other column the ratios of its time to that of ``ours``, by rounds."""
    ratios = {
        name: spread([other / ours for other, ours in zip(values, samples["ours"], strict=True)])
        for name, values in samples.items()
        if name != "ours"
    }
    return {
        "rounds": len(samples["ours"]),
        "columns": {name: spread(values) for name, values in samples.items()},
        "ratios": ratios,
    }
