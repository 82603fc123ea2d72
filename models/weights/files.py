"""Files of tensors as other projects write them. Nothing in a file is executed.

``.safetensors`` and torch's archives (``.pt``, ``.pth``, ``.bin``, ``.ckpt``) are read, alone or as the shards that an
index ``*.index.json`` lists. Tensors are mapped from the file: one that nobody reads takes no memory.
"""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..runtime.files import whole_file
from ..runtime.packages import package

ARCHIVES = (".pt", ".pth", ".bin", ".ckpt")
INDEX = ".index.json"
# Where training scripts keep the weights in a file that holds more, the best first.
PARTS = ("ema", "model", "state_dict", "module")
SAFETENSORS = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    torch.bool: "BOOL",
}


def read_weights(path: str | Path, part: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file by name.

    Args:
        path: a file, an index of shards, or a folder with one of them.
        part: of a file that holds several sets of weights, the one to take; by default the first that is there of
            ``ema``, ``model``, ``state_dict`` and ``module``.

    Raises:
        ValueError: a file that is not there or not whole, holds more than tensors and plain values, or lacks ``part``.
    """
    path = _one_file(Path(path))
    if path.name.endswith(INDEX):
        content = _shards(path)
    elif path.suffix == ".safetensors":
        content = _safetensors(path)
    elif path.suffix in ARCHIVES:
        content = _archive(path)
    else:
        raise ValueError(f"{path} has suffix {path.suffix!r}; it may be .safetensors, {', '.join(ARCHIVES)} or {INDEX}")
    return _part(path, content, part)


def _one_file(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(f"{path} is not there")
        return path
    for pattern in (f"*{INDEX}", "*.safetensors", *(f"*{suffix}" for suffix in ARCHIVES)):
        files = sorted(path.glob(pattern))
        if len(files) > 1:
            raise ValueError(f"{path} has {', '.join(file.name for file in files)}; name one of them")
        if files:
            return files[0]
    raise ValueError(f"{path} has no file of weights: no .safetensors, {', '.join(ARCHIVES)} or {INDEX}")


def _archive(path: Path) -> Any:
    if not zipfile.is_zipfile(path) and path.read_bytes()[:1] != b"\x80":
        raise ValueError(f"{path} is not a file that torch wrote, or is not whole")
    try:
        # The options of a training script, which DiT's train.py stores beside the weights, are plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # torch's own message goes on to advise loading the file unsafely.
        raise ValueError(f"{path} is refused: it holds more than tensors and plain values") from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not whole: {error}") from error


def _safetensors(path: Path) -> dict[str, Tensor]:
    files = package("safetensors.torch")
    try:
        return files.load_file(path)
    except Exception as error:  # its own class, SafetensorError, is not public
        raise ValueError(f"{path} cannot be read: {error}") from error


def _shards(path: Path) -> dict[str, Tensor]:
    try:
        names = json.loads(path.read_bytes())["weight_map"]
        places = {str(name): Path(file).name for name, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of shards: it has no weight_map of names and files") from error
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        shard = path.parent / name
        if not shard.is_file():
            raise ValueError(f"{path} names {name}, which is not beside it")
        content = _safetensors(shard) if shard.suffix == ".safetensors" else _archive(shard)
        tensors |= {key: content[key] for key, place in places.items() if place == name and key in content}
    missing = sorted(set(places) - set(tensors))
    if missing:
        raise ValueError(f"the shards of {path} lack {len(missing)} tensors: {', '.join(missing[:5])}")
    return tensors


def _part(path: Path, content: Any, part: str | None) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; it must hold tensors by name")
    parts = [name for name in PARTS if isinstance(content.get(name), Mapping)]
    if part is not None and part not in parts:
        raise ValueError(f"part is {part!r}; {path} has {', '.join(parts) or 'one set of weights only'}")
    if parts:
        content = content[part or parts[0]]
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"{path} holds no tensors by name; it has {', '.join(map(str, list(content)[:8])) or 'nothing'}"
        )
    wrapped = all(name.startswith("module.") for name in tensors)  # by DistributedDataParallel
    return {name.removeprefix("module.") if wrapped else name: value for name, value in tensors.items()}


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write tensors by name, as ``.safetensors`` or, under any other suffix, as torch's archive.

    Raises:
        OSError: it could not be written; nothing of it is left.
    """
    with whole_file(path) as file:
        if path.suffix == ".safetensors":
            _write_safetensors(file, weights)
        else:
            torch.save({name: value.detach().contiguous() for name, value in weights.items()}, file)


def _write_safetensors(file: IO[bytes], weights: Mapping[str, Tensor]) -> None:
    """The length of a header, the header, and the tensors one after the other, those of wide elements first.

    What the package writes has been in memory as a whole.
    """
    names = sorted(weights, key=lambda name: (-weights[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        value, start = weights[name], end
        end += value.numel() * value.element_size()
        header[name] = {"dtype": SAFETENSORS[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        file.write(weights[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
