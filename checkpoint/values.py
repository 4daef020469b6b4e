"""Plain values, bytes and tensors as JSON, so that nothing read back is ever a pickle.

``bytes`` become ``{"$bytes": base64}`` and tensors ``{"$tensor": base64, "dtype": ..., "shape": [...]}``; tuples become
lists. For the few kilobytes of a random generator, not for model state.
"""

import base64
import json
import math
from typing import Any

import torch

from checkpoint.index import DTYPES


def dumps(value: Any) -> bytes:
    """`value` as JSON. TypeError where it holds other than None, bool, int, float, str, bytes, tensor, list, dict."""
    return json.dumps(_plain(value), indent=1).encode()


def loads(content: bytes) -> Any:
    """The reverse of `dumps`; tensors come back on CPU. ValueError where `content` is not what `dumps` makes."""
    try:
        return _rich(json.loads(content))
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:  # RecursionError is a RuntimeError
        raise ValueError(f"not a value of a checkpoint: {error!r}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().flatten()
        content = base64.b64encode(flat.view(torch.uint8).numpy().tobytes()).decode()
        return {"$tensor": content, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key.startswith("$"):
                raise TypeError(f"a key in a checkpoint is a string that does not start with $, not {key!r}")
        return {key: _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be stored in a checkpoint: {value!r}")


def _rich(value: Any) -> Any:
    if isinstance(value, list):
        return [_rich(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$bytes" in value:
        return base64.b64decode(value["$bytes"], validate=True)
    if "$tensor" in value:
        content = bytearray(base64.b64decode(value["$tensor"], validate=True))
        dtype = DTYPES[value["dtype"]].torch
        if len(content) != math.prod(value["shape"]) * dtype.itemsize:
            raise ValueError(f"{len(content)} bytes do not make a {value['dtype']} tensor of shape {value['shape']}")
        flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return flat.reshape(value["shape"])
    return {key: _rich(item) for key, item in value.items()}
