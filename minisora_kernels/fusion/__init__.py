"""Ops put into a model of anybody's: Dynamo reads its code, a pass rewrites the graph, which then runs as it is.

The parts that need Dynamo and sympy are imported when a model is first read, for they take seconds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch

from .report import Site, Sites
from .serve import Choice, Unserved

# Blocks that are traced one by one, after a break of the graph, share one code object.
RECOMPILE_LIMIT = 64


class _Call:
    """What a fused model calls instead of its own ``_call_impl``: hooks and forward are the model's own."""

    def __init__(self, model: torch.nn.Module, choice: Choice) -> None:
        self.sites, self.choice, self.root = Sites(), choice, type(model).__name__
        # Else all modules of a process share the limit of the one code object that calls them, and its shapes.
        wanted = dict(recompile_limit=RECOMPILE_LIMIT, isolate_recompiles=True)
        known = inspect.signature(torch.compile).parameters  # those of torch 2.10 have neither
        limits: dict[str, Any] = {name: setting for name, setting in wanted.items() if name in known}
        call: Callable = model._call_impl
        # Dynamo reads a container of torch only where code calls it.
        if str(type(model).forward.__module__).startswith("torch."):

            def call(*arguments: Any, **options: Any) -> Any:
                return model._call_impl(*arguments, **options)

        self._compiled = torch.compile(call, backend=self._rewrite, **limits)

    def _rewrite(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        from .rewrite import rewrite  # imports sympy

        self.sites.add(rewrite(module, self.choice, self.root), getattr(module, "compile_subgraph_reason", None))
        return module.forward

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        try:
            return self._compiled(*arguments, **options)
        except RuntimeError as error:  # Dynamo wraps what its backend raises
            inner = getattr(error, "inner_exception", None)
            if isinstance(inner, Unserved):
                raise inner from None
            raise


class Fused:
    """A model that runs on ops where they fit. As a context manager it undoes that at the end of the block.

    Attributes:
        model: The very model.
    """

    def __init__(self, model: torch.nn.Module, call: _Call | None) -> None:
        self.model, self._call = model, call

    def __enter__(self) -> Fused:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    @property
    def sites(self) -> list[Site]:
        """The places that were found in what was called so far."""
        return [] if self._call is None else list(self._call.sites)

    def undo(self) -> None:
        """The model runs as before. Undoing twice, or after another call was put in, does nothing."""
        if self._call is not None and self.model.__dict__.get("_compiled_call_impl") is self._call:
            del self.model.__dict__["_compiled_call_impl"]

    def report(self) -> str:
        """Per class of block: each op with the number of its sites, and what serves them or why they are left."""
        return "fused before: nothing was found" if self._call is None else self._call.sites.text()


def fuse(
    model: torch.nn.Module,
    *,
    ops: Collection[str] | None = None,
    backend: str | None = None,
    mode: str = "auto",
) -> Fused:
    """Run ``model`` on the ops wherever its code computes what they compute; no compiler is needed.

    Dynamo reads the code when the model is called; a pass puts ops into the graph, which then runs eagerly. Values and
    gradients are equal to rounding. No parameter, module, class or hook changes. What the pass does not understand
    stays as it is.

    Args:
        model: Any module. ``model(...)`` takes the ops; ``model.forward(...)`` does not.
        ops: Names of the ops that may be put in: ``"adaln"``, ``"attention"``, ``"gate_residual"``,
            ``"gate_residual_adaln"`` (which joins adaln and the one before), ``"gelu_mlp"``, ``"glu_mlp"``,
            ``"patch_embed"``, ``"window_attention"``; None for all.
        backend: Backend of every op, or None for the automatic choice.
        mode: ``"auto"`` leaves a site where the record of the device prefers plain PyTorch. ``"on"`` takes any kernel
            that serves the call, and raises from the call of the model where there is none.

    Returns:
        A handle with ``undo()``, ``report()`` and ``sites``, which is a context manager too. A model that is fused
        already gets a handle that does nothing.

    Raises:
        TypeError: ``model`` is no module, or ``ops`` no collection.
        ValueError: There is no such op, backend or mode; the model has a compiled call already.
        RuntimeError: The chosen backend is not available.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU("tanh"), torch.nn.Linear(32, 8))
        >>> with fuse(model, backend="reference") as fused:
        ...     y = model(torch.randn(2, 4, 8))
        >>> [site.op for site in fused.sites]
        ['gelu_mlp']
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"fuse: model must be a torch.nn.Module, got {type(model).__name__}")
    choice = Choice.of("fuse", ops, backend, mode)
    present = model._compiled_call_impl
    if isinstance(present, _Call):
        return Fused(model, None)
    if present is not None or hasattr(model, "_orig_mod"):
        raise ValueError("fuse: the model is compiled already; pass backend=compiler() to torch.compile instead")
    call = _Call(model, choice)
    model.__dict__["_compiled_call_impl"] = call
    return Fused(model, call)


class Compiler:
    """A backend for ``torch.compile``: the pass, then another backend."""

    def __init__(self, inner: str | Callable, choice: Choice) -> None:
        self.inner, self.choice, self._sites = inner, choice, Sites()

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable:
        from torch._dynamo import lookup_backend  # takes seconds

        from .rewrite import rewrite

        self._sites.add(rewrite(module, self.choice, "model"), getattr(module, "compile_subgraph_reason", None))
        inner = lookup_backend(self.inner) if isinstance(self.inner, str) else self.inner
        return inner(module, inputs, **options)

    @property
    def sites(self) -> list[Site]:
        """The places that were found in what was compiled so far."""
        return list(self._sites)

    def report(self) -> str:
        """As :meth:`Fused.report`."""
        return self._sites.text()


def compiler(
    inner: str | Callable = "inductor",
    *,
    ops: Collection[str] | None = None,
    backend: str | None = None,
    mode: str = "auto",
) -> Compiler:
    """A backend for ``torch.compile`` that puts in the ops, as :func:`fuse` does, before ``inner`` compiles the rest.

    Args:
        inner: Name of a backend of ``torch.compile``, or one as a function.
        ops: As of :func:`fuse`.
        backend: As of :func:`fuse`.
        mode: As of :func:`fuse`. torch.compile wraps the error.

    Returns:
        What ``torch.compile(model, backend=...)`` takes; it has ``report()`` and ``sites``.

    Raises:
        TypeError: ``inner`` is neither a name nor a function.
        ValueError: There is no such op, backend or mode.
        RuntimeError: The chosen backend is not available.

    Examples:
        >>> model = torch.compile(torch.nn.Linear(8, 8), backend=compiler())
    """
    if not isinstance(inner, str) and not callable(inner):
        raise TypeError(f"compiler: inner must be the name of a backend or a function, got {type(inner).__name__}")
    return Compiler(inner, Choice.of("compiler", ops, backend, mode, compiling=True))
