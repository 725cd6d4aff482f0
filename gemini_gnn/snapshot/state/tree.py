"""Values as JSON plus arrays: the ``state_dict`` of a scheduler, a loop or a random generator. No pickle.

Bit-exact for None, bool, int, float (NaN and infinities too), str, bytes, list, tuple, dict, Counter, numpy arrays and
scalars, and tensors. Anything else is refused by name instead of pickled.
"""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict, deque
from typing import Any

import numpy as np
import torch

from gemini_gnn.errors import SnapshotError

_TAG = "__is__"
_PLAIN = frozenset((type(None), bool, int, float, str))


def pack(value: Any, path: str = "", arrays: list[np.ndarray] | None = None) -> tuple[Any, list[np.ndarray]]:
    """``(tree, arrays)``: JSON values, and copies of the arrays they refer to; later changes of ``value`` don't reach
    them.

    Args:
        arrays: those of an earlier call, to append to: the trees of both may become parts of one.

    Raises:
        SnapshotError: a value of another type, named by its path.
    """
    arrays = [] if arrays is None else arrays
    return _pack(value, path, arrays), arrays


def _pack(value: Any, path: str, arrays: list[np.ndarray]) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        if all(type(v) in _PLAIN for v in value):
            return list(value)
        return [_pack(v, f"{path}[{i}]", arrays) for i, v in enumerate(value)]
    if kind is tuple:
        return {_TAG: "tuple", "v": [_pack(v, f"{path}[{i}]", arrays) for i, v in enumerate(value)]}
    if kind in (dict, OrderedDict, Counter) or (kind.__name__ == "defaultdict"):
        if kind is not Counter and all(type(k) is str for k in value) and _TAG not in value:
            return {
                k: v if type(v) in _PLAIN else _pack(v, f"{path}.{k}" if path else k, arrays) for k, v in value.items()
            }
        return {
            _TAG: "counter" if kind is Counter else "dict",
            "v": [[_pack(k, path, arrays), _pack(v, f"{path}[{k!r}]", arrays)] for k, v in value.items()],
        }
    if kind is deque:
        return {_TAG: "deque", "n": value.maxlen, "v": [_pack(v, path, arrays) for v in value]}
    if kind in (set, frozenset):
        return {_TAG: "set", "v": [_pack(v, path, arrays) for v in sorted(value, key=repr)]}
    if kind is bytes:
        return _array("bytes", np.frombuffer(value, np.uint8), "uint8", (len(value),), arrays)
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu().clone().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        raw = tensor.reshape(-1).view(torch.uint8).numpy()
        return _array("tensor", raw, dtype, tuple(tensor.shape), arrays)
    if isinstance(value, np.generic):
        one = np.asarray(value)
        _plain(one, path)
        return _array("scalar", one.reshape(-1).view(np.uint8).copy(), one.dtype.str, (), arrays)
    if isinstance(value, np.ndarray):
        _plain(value, path)
        raw = np.frombuffer(value.tobytes(), np.uint8)
        return _array("array", raw, value.dtype.str, value.shape, arrays)
    for plain in (int, float, str):  # an enum or another subclass of a number
        if isinstance(value, plain):
            return plain(value.value if isinstance(value, enum.Enum) else value)
    raise SnapshotError(
        f"{path or 'state'}: expected None, bool, numbers, str, bytes, list, tuple, dict, numpy arrays or tensors; "
        f"got {kind.__module__}.{kind.__qualname__}: let state_dict() return it in terms of these"
    )


def _plain(value: np.ndarray, path: str) -> None:
    if value.dtype.kind not in "biufcSU":
        raise SnapshotError(f"{path or 'state'}: expected an array of numbers or strings; got dtype {value.dtype}")


def _array(kind: str, raw: np.ndarray, dtype: str, shape: tuple[int, ...], arrays: list[np.ndarray]) -> dict[str, Any]:
    arrays.append(raw)
    return {_TAG: kind, "a": len(arrays) - 1, "d": dtype, "s": list(shape)}


def unpack(tree: Any, arrays: list[Any]) -> Any:
    """The value :func:`pack` was given; ``arrays`` are bytes-like and are copied.

    Raises:
        SnapshotError: the tree refers to an array that is not there, or has an unknown form.
    """
    try:
        return _unpack(tree, arrays)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise SnapshotError(
            f"expected the values of a snapshot; got a tree that does not hold together: {error}; start again with "
            "resume=never"
        ) from None


def _unpack(tree: Any, arrays: list[Any]) -> Any:
    if isinstance(tree, list):
        return [_unpack(v, arrays) for v in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree.get(_TAG)
    if kind is None:
        return {k: _unpack(v, arrays) for k, v in tree.items()}
    if kind == "tuple":
        return tuple(_unpack(v, arrays) for v in tree["v"])
    if kind == "set":
        return {_unpack(v, arrays) for v in tree["v"]}
    if kind == "deque":
        return deque((_unpack(v, arrays) for v in tree["v"]), tree["n"])
    if kind in ("dict", "counter"):
        pairs = {_unpack(k, arrays): _unpack(v, arrays) for k, v in tree["v"]}
        return Counter(pairs) if kind == "counter" else pairs
    raw = bytearray(arrays[tree["a"]])
    if kind == "bytes":
        return bytes(raw)
    if kind == "tensor":
        dtype = getattr(torch, tree["d"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"no dtype {tree['d']}")
        if not raw:
            return torch.empty(tree["s"], dtype=dtype)
        return torch.frombuffer(raw, dtype=dtype).reshape(tree["s"])
    dtype = np.dtype(tree["d"])
    if dtype.hasobject:
        raise ValueError(f"dtype {dtype}")
    array = np.frombuffer(raw, dtype=dtype).reshape(tree["s"])
    if kind == "array":
        return array
    if kind == "scalar":
        return array[()]
    raise ValueError(f"unknown kind {kind!r}")
