"""What ``torch.compile`` reads and writes on a GPU beside our kernels, without a GPU: ``python -m bench.inductor``.

Dynamo and autograd trace plain PyTorch on tensors without memory; Inductor then generates the code for a device with
the properties of an H100, and nothing runs. Its bytes are its own count: every tensor that a kernel or a library call
reads or writes, once per kernel. Ours are those of bench/gpu/traffic.py. Both go to ``bench/results/inductor.json`` in
units of one activation: the tokens in bfloat16. It says nothing about time, which follows from bytes only for kernels
that reach a GPU's bandwidth.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import types
from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

import minisora_kernels as mk
from bench.aot import on_meta_tensors
from bench.harness.record import RESULTS, head, round_floats
from bench.harness.session import Problem, tuple_of
from bench.harness.shapes import Patches, Tokens, Windows
from bench.ops import (
    bench_adaln,
    bench_gate_residual,
    bench_gate_residual_adaln,
    bench_patch_embed,
    bench_window_attention,
)
from minisora_kernels.commands import command

RECORD = RESULTS / "inductor.json"
DTYPE = torch.bfloat16
GPU = torch.device("cuda", 0)
# What Inductor asks of an H100 SXM.
PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    L2_cache_size=50 << 20,
    is_integrated=False,
    clock_rate=1_980_000,
    memory_clock_rate=2_619_000,
    memory_bus_width=5120,
    gcnArchName="",
)


class Row(NamedTuple):
    """An op on a shape, and its problem in the benches."""

    op: str
    shape: Tokens | Windows | Patches
    make: Callable[..., Problem]

    @property
    def activation(self) -> int:
        """Bytes of the unit."""
        shape = self.shape
        if isinstance(shape, Tokens):
            return shape.batch * shape.count * shape.width * DTYPE.itemsize
        width = shape.heads * shape.head_dim if isinstance(shape, Windows) else shape.width
        return shape.batch * prod(shape.grid) * width * DTYPE.itemsize


def _tokens(batch: int, rows: int = 1) -> Tokens:
    """32,768 tokens of XL's width in all."""
    name = f"batch {batch}" + (f", {rows} rows" if rows > 1 else "")
    return Tokens(name, batch, 32768 // batch, 1152, rows)


def _windows(name: str, grid: tuple[int, int, int], window: tuple[int, int, int], norm_and_rope: bool) -> Windows:
    return Windows(name + ", norm and rotary" * norm_and_rope, grid, window, 16, 72, norm_and_rope=norm_and_rope)


MODULATED = (_tokens(1), _tokens(2), _tokens(8), _tokens(1, 16), _tokens(2, 16))
WINDOWS = (
    *(
        _windows(f"temporal {frames}", (frames, 32, 32), (frames, 1, 1), norm_and_rope)
        for frames in (16, 32)
        for norm_and_rope in (False, True)
    ),
    _windows("spatial 16x16", (16, 16, 16), (1, 16, 16), True),
)
PATCHES = tuple(Patches(f"patch 1x2x2, batch {batch}", 4, (16, 64, 64), (1, 2, 2), batch=batch) for batch in (1, 8))
ROWS = {
    f"{row.op}: {row.shape.name}": row
    for row in (
        *(Row("adaln", shape, bench_adaln.problem) for shape in MODULATED),
        *(Row("gate_residual", shape, bench_gate_residual.problem) for shape in MODULATED[:3]),
        *(Row("gate_residual_adaln", shape, bench_gate_residual_adaln.problem) for shape in MODULATED),
        *(Row("window_attention", shape, bench_window_attention.problem) for shape in WINDOWS),
        *(Row("patch_embed", shape, bench_patch_embed.problem) for shape in PATCHES),
    )
}


class Driver:
    """What Inductor asks of Triton's driver before anything is compiled for it."""

    def is_active(self) -> bool:
        return True

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * PROPERTIES.major + PROPERTIES.minor, PROPERTIES.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return GPU


def pretend() -> None:
    """torch, Inductor and Triton are told of a GPU, for the rest of this process."""
    from torch._dynamo.device_interface import CudaInterface
    from triton.runtime import driver

    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": PROPERTIES,
        "get_device_capability": (PROPERTIES.major, PROPERTIES.minor),
        "get_compute_capability": 10 * PROPERTIES.major + PROPERTIES.minor,
        "get_device_name": PROPERTIES.name,
        "is_bf16_supported": True,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "set_device": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "_lazy_init": None,
    }
    for place in (torch.cuda, CudaInterface, CudaInterface.Worker):
        for name, answer in answers.items():
            if hasattr(place, name):
                setattr(place, name, staticmethod(lambda *_, answer=answer, **__: answer))
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch.version.cuda = "12.8"
    driver.set_active(Driver())


class Generated(Exception):
    """Ends a compilation once its code is there."""

    def __init__(self, graph: Any) -> None:
        from torch._inductor.scheduler import NopKernelSchedulerNode

        super().__init__()
        graph.codegen()
        nodes = [node for node in graph.scheduler.nodes if not isinstance(node, NopKernelSchedulerNode)]
        self.moved = sum(node.get_read_write_buffers_sizes() for node in nodes)
        self.kernels = len(nodes)


def generate(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> dict[str, int]:
    """What Inductor makes of a graph that was traced on a CPU, on the GPU.

    Autograd needs a device that torch was built for, so the tracing is on a CPU. A graph names its device where it
    makes tensors; the rest follows the inputs.
    """
    from torch._dynamo.utils import detect_fake_mode
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    def moved(value: Any) -> Any:
        if isinstance(value, torch.device):
            return GPU
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)
        return value

    def stop(self: GraphLowering) -> None:
        raise Generated(self)

    for node in graph.graph.nodes:
        node.kwargs = {name: moved(value) for name, value in node.kwargs.items()}
    graph.recompile()
    mode = detect_fake_mode(inputs)
    assert mode is not None
    with mode:
        inputs = [moved(value) for value in inputs]
    with torch.no_grad():
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*inputs)
    try:
        with patch.object(GraphLowering, "compile_to_module", stop):
            compile_fx_inner(graph, inputs, **options)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, Generated):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        return {"bytes": cause.moved, "kernels": cause.kernels}
    raise AssertionError("Inductor made no code")


def compiled(problem: Problem, call: Callable[..., Any]) -> dict[str, dict[str, int]]:
    """Of forward and backward of a call: bytes and kernels of ``torch.compile``."""
    from torch._inductor.compile_fx import compile_fx

    found: dict[str, dict[str, int]] = {}

    def inner(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
        again = copy.deepcopy(graph)
        found["backward" if options.get("is_backward") else "forward"] = generate(graph, inputs, **options)

        def run(arguments: list[Any]) -> Any:
            return again(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return compile_fx(graph, inputs, inner_compile=inner)

    torch._dynamo.reset()
    with mk.use_backend("reference"):
        outputs = tuple_of(torch.compile(call, backend=backend, fullgraph=True, dynamic=False)(problem.inputs))
        wanted = [problem.inputs[name] for name in problem.gradient_names]
        torch.autograd.grad(outputs, wanted, [torch.empty_like(output) for output in outputs])
    return found


def ours(row: Row) -> dict[str, dict[str, int]]:
    """Of forward and backward: bytes and kernels of ours, and the bytes of passing every tensor once."""
    from triton.runtime.jit import JITFunction

    launches: Counter[str] = Counter()
    found = {}
    with on_meta_tensors() as moved, patch.object(JITFunction, "run", lambda *_, **__: launches.update(["kernels"])):

        def counted() -> dict[str, int]:
            count = {"bytes": moved["does"], "least": moved["must"], "kernels": launches["kernels"]}
            moved.clear()
            launches.clear()
            return count

        problem = row.make(row.shape, DTYPE, torch.device("meta"))
        outputs = tuple_of(problem.call(problem.inputs))
        found["forward"] = counted()
        torch.autograd.grad(outputs, [problem.inputs[name] for name in problem.gradient_names], outputs)
        found["backward"] = counted()
    return found


def measure(row: Row) -> dict[str, Any]:
    """A row of the record. Of several forms in plain PyTorch the one that moves the fewest bytes counts."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        problem = row.make(row.shape, DTYPE, torch.device("cpu"))
        forms = {"reference": compiled(problem, problem.call)}
        if problem.written is not None:
            name, call = problem.written
            forms[name] = compiled(problem, call)
    form = min(forms, key=lambda name: sum(part["bytes"] for part in forms[name].values()))
    own = ours(row)
    parts = {}
    for part in ("forward", "backward"):
        parts[part] = {
            "least": own[part]["least"] / row.activation,
            "ours": own[part]["bytes"] / row.activation,
            "our_kernels": own[part]["kernels"],
            "compile": forms[form][part]["bytes"] / row.activation,
            "compile_kernels": forms[form][part]["kernels"],
        }
    return round_floats({"form": form, **parts})


@command(failed=2)
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", action="append", choices=ROWS, help="print these rows alone, as JSON")
    options = parser.parse_args(arguments)
    made = head(torch.device("cpu"), "default")
    pretend()
    with (
        torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        rows = {name: measure(ROWS[name]) for name in options.row or ROWS}
    if options.row:
        print(json.dumps(rows))
        return 0
    kept = {key: made[key] for key in ("format", "date", "commit", "dirty", "versions")}
    RECORD.write_text(json.dumps({**kept, "device": PROPERTIES.name, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
