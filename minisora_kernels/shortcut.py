"""A call without gradients that is like an earlier one goes straight to its raw op or reference.

Checks and the choice of a backend take longer than a small kernel. What they find depends on the signature of a call
alone: the class, dtype, device, shape and strides of each tensor, what dispatches it (autocast, a transform, a trace),
the other arguments, and the backend that is forced. So the first call of a signature is recorded: which raw op or
reference it called, with what, and what of its results it returned. Later ones compare the signature, in one call of
torch's guard, and call the same. A small raw op is called without the dispatcher. Any other call, with every error,
takes the way of the first. So does a call under a profiler, which records what the dispatcher tells it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import is_, itemgetter
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from . import backends
from .forcing import forced_eagerly

try:
    from torch._C._dynamo import guards
except ImportError:  # private: without it every call takes the long way
    guards = None  # type: ignore[assignment]

P = ParamSpec("P")
R = TypeVar("R")
View = tuple[int, tuple[int, ...], tuple[int, ...]]  # its place, size and stride

# Signatures that are kept per op, forced backend and names of arguments: the first that come. To record one takes
# longer than a call, so none makes room for another.
KEPT = 8

# Numbers in the tensors of a small call. Its kernel takes microseconds, in which it keeps the GIL.
SMALL = 4096

_NUMBERS = (type(None), bool, int, float, str)
_all: list[dict[tuple, list[_Path]]] = []


class _Path(NamedTuple):
    """A recorded call. Its values are the arguments, by position, then by name. A getter of all is None."""

    check: Callable[..., bool]
    tensors: Callable[[tuple], tuple] | None
    constants: Callable[[tuple], tuple]  # the other values
    given: tuple
    serve: Callable[..., Any] | None  # None: the call takes the long way
    more: tuple = ()  # what ``serve`` takes beside the values
    picked: Callable[[tuple], tuple] | None = None  # the arguments of ``serve``, of both; None: all in their order
    views: tuple[View, ...] = ()  # those of them that are views
    finish: Callable[[Any], Any] | None = None


def shortcut(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate an op whose result depends on its arguments, the choice of a backend and autocast alone."""
    paths: dict[tuple, list[_Path]] = {}
    _all.append(paths)

    @functools.wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        if is_grad_enabled() or is_dynamo_compiling() or forward_ad._current_level >= 0 or _profiler_enabled():
            return function(*arguments, **options)
        name = forced_eagerly(backends.FORCED)
        if options:
            values: tuple = (*arguments, *options.values())
            key: tuple = (name, len(arguments), *options)
            rope = options.get("rope")
            if isinstance(rope, tuple):  # its parts count as arguments
                values = (*[value for value in values if value is not rope], *rope)
                key = (*key, type(rope))
        else:
            values, key = arguments, (name, len(arguments))
        for check, tensors, constants, given, serve, more, picked, views, finish in paths.get(key, ()):
            if not check(*(values if tensors is None else tensors(values))):
                continue
            if given and not _same(constants(values), given):
                continue
            if serve is None:
                return function(*arguments, **options)
            found = values + more if picked is None else picked(values + more)
            if views:
                found = _viewed(found, views)
            result = serve(*found)
            return result if finish is None else finish(result)
        kept = paths.setdefault(key, [])
        if len(kept) < KEPT and _can_record(values):
            return _record(kept, function, values, arguments, options)
        return function(*arguments, **options)

    return call


def forget() -> None:
    """Record every call anew: the choice of backends may be another now."""
    for paths in _all:
        paths.clear()


def _viewed(found: tuple, views: tuple[View, ...]) -> tuple:
    arguments = list(found)
    for place, size, stride in views:
        arguments[place] = found[place].as_strided(size, stride)
    return tuple(arguments)


def _same(values: tuple, given: tuple) -> bool:
    """Whether constants are the same, and of the same types: True is no 1."""
    return all(map(is_, values, given)) or _exact(values) == _exact(given)


def _exact(values: tuple) -> list[tuple]:
    return [(type(value), value, *map(type, value if isinstance(value, tuple) else ())) for value in values]


def _can_record(values: tuple) -> bool:
    """Whether tensors are torch's own, not empty, apart in memory, and no state but that of the signature counts."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors or guards is None:
        return False
    if not _plain_dispatch():
        return False
    for value in values:
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or not value.numel():
                return False
            if not value.is_floating_point():  # the op looks at its numbers
                return False
            if value.is_nested or value.is_neg():  # it has no shape, or the dispatcher turns its signs
                return False
            if value.is_cuda and value.dtype == torch.float32:  # the choice depends on a setting of torch's too
                return False
        elif not _is_constant(value):
            return False
    if torch.is_autocast_enabled(tensors[0].device.type):  # its dtype is in no signature
        return False
    return len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


def _plain_dispatch() -> bool:
    """Whether this thread has nothing between a call and the kernels, such as a mode, a transform or a trace."""
    keys = torch._C._dispatch_tls_local_include_set()
    for usual in (torch.DispatchKey.BackendSelect, torch.DispatchKey.ADInplaceOrView):
        keys = keys.remove(usual)
    return keys.raw_repr() == 0


def _is_constant(value: object) -> bool:
    return type(value) in _NUMBERS or (type(value) is tuple and all(type(item) in _NUMBERS for item in value))


def _record(kept: list[_Path], function: Callable, values: tuple, arguments: tuple, options: dict) -> Any:
    """Call ``function``, and keep how to come to its result the next time."""
    places = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
    others = [i for i in range(len(values)) if i not in places]
    tensors = [values[i] for i in places]
    check = guards.TensorGuards(
        *tensors,
        dynamic_dims_sizes=[[*tensor.shape] for tensor in tensors],  # type: ignore[misc]
        dynamic_dims_strides=[[*tensor.stride()] for tensor in tensors],  # type: ignore[misc]
    ).check  # the stub knows lists of numbers where torch takes a list per tensor
    calls: list[tuple[Any, tuple, Any]] = []
    backends.watch.calls = calls
    try:
        result = function(*arguments, **options)
    finally:
        backends.watch.calls = None
    constants = _getter(others)
    signature = check, _getter(places) if others else None, constants, constants(values)
    replay = _replay(calls[0], values, places, result) if len(calls) == 1 else None
    kept.append(_Path(*signature, None) if replay is None else _Path(*signature, *replay))
    return result


def _getter(places: Sequence[int]) -> Callable[[tuple], tuple]:
    """What takes the values of these places."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))  # a single one would be no tuple


def _replay(call: tuple[Any, tuple, Any], values: tuple, places: list[int], result: Any) -> tuple | None:
    """What of a :class:`_Path` leads from the values to the result; None if another way than this was taken."""
    function, arguments, results = call
    starts = {values[i].data_ptr(): i for i in places}
    picked: list[int] = []
    more: list[Any] = []
    views = []
    for place, argument in enumerate(arguments):
        if not isinstance(argument, Tensor):
            if not _is_constant(argument) and not isinstance(argument, torch.dtype):
                return None
            picked.append(len(values) + len(more))
            more.append(argument)
            continue
        if argument.data_ptr() not in starts:
            return None
        source = starts[argument.data_ptr()]
        value = values[source]
        if argument.dtype != value.dtype:
            return None
        picked.append(source)
        if argument.shape != value.shape or argument.stride() != value.stride():
            views.append((place, tuple(argument.shape), argument.stride()))
    finish = _finish(results, result)
    if finish is False:
        return None
    get = None if picked == list(range(len(values) + len(more))) else _getter(picked)
    serve = _kernel(function, [values[i] for i in places]) if isinstance(function, torch._ops.OpOverload) else function
    return serve, tuple(more), get, tuple(views), finish


def _kernel(raw: torch._ops.OpOverload, tensors: Sequence[Tensor]) -> Callable[..., Any]:
    """The kernel of a small call, else the dispatcher, which lets other threads run meanwhile."""
    if sum(tensor.numel() for tensor in tensors) > SMALL:
        return raw._op
    key = tensors[0].device.type.upper()
    kernel = torch.library.get_kernel(raw, key)
    return functools.partial(kernel.call_boxed, torch.DispatchKeySet(getattr(torch.DispatchKey, key)))


def _finish(results: Any, result: Any) -> Any:
    """What makes the op's result of the raw op's; None for nothing, False if this cannot tell."""
    if result is results:
        return None
    returned = results if isinstance(results, tuple) else (results,)
    if isinstance(result, tuple):
        chosen = [i for each in result for i, one in enumerate(returned) if one is each]
        return itemgetter(*chosen) if len(chosen) == len(result) > 1 else False
    for i, one in enumerate(returned):
        if one is result:
            return itemgetter(i)
        if one.data_ptr() == result.data_ptr() and one.is_contiguous() and result.is_contiguous():
            shape = tuple(result.shape)
            if one is results:
                return lambda out: out.view(shape)
            return lambda out: out[i].view(shape)
    return False
