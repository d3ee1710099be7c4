"""Values between the judge and a student's process: JSON for structure, safetensors for tensors, never a pickle.

A message is `[length of JSON, 8 bytes][length of tensors, 8 bytes][JSON][safetensors]`. What comes from a student's process
is bytes to distrust: reading them builds plain values and tensors and runs nothing.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

HEADER = struct.Struct("<QQ")
DEPTH = 50
TREE = 8 << 20
"""Bytes of JSON that a student's process may send: parsed, they take twenty times as much. Tensors lie beside it."""


class WireError(ValueError):
    """The bytes are no message of this format."""


class Opaque:
    """Stands for a value that is not carried over: only the name of its type is known."""

    def __init__(self, name: str) -> None:
        self.name = name


def encode(value: Any, most: int = 1 << 26) -> bytes:
    """value: None, bool, numbers, strings, tensors, arrays, and lists, tuples, dictionaries and what can be gone through of them.

    Anything else becomes an `Opaque`. Raises WireError where it would take more than `most` bytes.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_down(value, tensors, 0)).encode()
    if len(tree) + sum(t.nbytes for t in tensors.values()) > most:
        raise WireError(f"more than {most >> 20} MB")
    body = save(tensors)
    return HEADER.pack(len(tree), len(body)) + tree + body


def decode(message: bytes, most: int | None = None) -> Any:
    """The value of a message; raises WireError for anything else, and for more than `most` bytes of JSON."""
    try:
        length, rest = HEADER.unpack(message[: HEADER.size])
        tree = message[HEADER.size : HEADER.size + length]
        body = message[HEADER.size + length :]
        if most is not None and length > most:
            raise WireError("too many values outside of tensors")
        if len(body) != rest:
            raise WireError("lengths do not fit")
        return _up(json.loads(tree), load(body), 0)
    except WireError:
        raise
    except (
        Exception
    ) as error:  # whatever a forged message makes json, safetensors or the tree raise
        raise WireError(f"no message: {type(error).__name__}") from None


def native(array: np.ndarray) -> np.ndarray | list:
    """`array` if torch takes it, else a copy: read forwards, in this machine's byte order, of 64 bits at most, to be written to.

    An array of objects becomes a list.
    """
    if array.dtype == object:
        return array.tolist()
    wide = array.dtype.kind == "f" and array.dtype.itemsize > 8
    kind = np.dtype(np.float64) if wide else array.dtype.newbyteorder("=")
    taken = kind == array.dtype and array.flags.writeable and min(array.strides, default=0) >= 0
    return array if taken else np.array(array, kind, order="C")


def _down(value: Any, tensors: dict[str, Tensor], depth: int) -> list:
    if depth > DEPTH:
        return ["other", "something nested too deeply"]
    if isinstance(value, np.ndarray):
        value = native(value)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(value)
    elif isinstance(value, np.generic):
        value = float(value) if isinstance(value, np.floating) else value.item()
    if isinstance(value, Tensor):
        flat = value.detach().as_subclass(Tensor)
        flat = (flat.to_dense() if flat.layout != torch.strided else flat).cpu()
        if flat.is_complex() or flat.is_quantized:
            return ["other", f"a tensor of {value.dtype}"]
        tensors[str(len(tensors))] = flat.contiguous().clone()
        return ["tensor", str(len(tensors) - 1), bool(value.requires_grad)]
    if value is None or isinstance(value, bool | str):
        return ["plain", value]
    if isinstance(value, int):
        return ["int", str(int(value))]
    if isinstance(value, float):
        return ["float", repr(float(value))]
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return [kind, [_down(v, tensors, depth + 1) for v in value]]
    if isinstance(value, dict):
        rows = [[_down(v, tensors, depth + 1) for v in pair] for pair in value.items()]
        return ["dict", rows]
    if isinstance(value, Iterable) and not isinstance(value, bytes | bytearray | torch.nn.Module):
        try:  # keys, sets, generators, arrays of strings: the judge takes them for lists
            return ["list", [_down(v, tensors, depth + 1) for v in value]]
        except WireError:
            raise
        except Exception:  # a generator that stops with an error of its own
            pass
    return ["other", type(value).__name__[:50]]


def _up(tree: list, tensors: dict[str, Tensor], depth: int) -> Any:
    if depth > 2 * DEPTH:
        raise WireError("nested too deeply")
    kind, content = tree[0], tree[1]
    if kind == "tensor":
        return tensors[content].requires_grad_(
            bool(tree[2]) and tensors[content].is_floating_point()
        )
    if kind == "plain" and (content is None or isinstance(content, bool | str)):
        return content
    if kind == "int":
        return int(content)
    if kind == "float":
        return float(content)
    if kind in ("list", "tuple"):
        values = [_up(v, tensors, depth + 1) for v in content]
        return values if kind == "list" else tuple(values)
    if kind == "dict":
        return {_up(k, tensors, depth + 1): _up(v, tensors, depth + 1) for k, v in content}
    if kind == "other":
        return Opaque("".join(c for c in str(content)[:60] if c.isprintable()))
    raise WireError("unknown kind")
