"""Packs what the page that plays loads, from nano and from book/_data/play, whenever the book is staged.

A browser may not read a file beside a page that was itself opened from a file; a script it may run. So the weights come as
scripts, of about a megabyte each, that hand over a piece of text. Weights are bf16: the upper bytes of all numbers, then
the lower ones (upper bytes repeat themselves, so they shrink), deflated, in base 85.

`data/index.js` alone comes with the page: what there is, and what was recorded. The rest is asked for by its button.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PIECE = 800_000  # bytes before they become text; a multiple of 4, the unit of base 85
Tensors = dict[str, tuple[list[int], bytes]]


def tensors(path: Path) -> Tensors:
    """Name → shape and bytes of a safetensors file. Raises ValueError for another type than bf16."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    if other := {entry["dtype"] for entry in header.values()} - {"BF16"}:
        raise ValueError(
            f"{path.name} holds {', '.join(other)}; bf16 is expected, as the page reads"
        )
    data = content[8 + length :]
    return {
        name: (entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in sorted(header.items())
    }


def bundle(name: str, content: Tensors) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What the index says of a bundle, and its scripts by file name."""
    numbers = b"".join(data for _, data in content.values())
    packed = zlib.compress(numbers[1::2] + numbers[0::2], 9)
    pieces = [packed[i : i + PIECE] for i in range(0, len(packed), PIECE)]
    scripts = {
        f"{name}-{i}.js": f'receivePlayData("{name}", {i}, "{base64.b85encode(piece).decode()}");\n'.encode()
        for i, piece in enumerate(pieces)
    }
    entry = {
        "pieces": list(scripts),
        "bytes": len(packed),
        "tensors": [[key, shape] for key, (shape, _) in content.items()],
    }
    return entry, scripts


def tokenizer(path: Path) -> dict[str, Any]:
    """The vocabulary in the order of its ids, and the merges."""
    model = json.loads(path.read_text())["model"]
    vocabulary = sorted(model["vocab"], key=model["vocab"].get)
    assert [model["vocab"][token] for token in vocabulary] == list(range(len(vocabulary)))
    return {"vocabulary": vocabulary, "merges": model["merges"]}


def packed(root: Path) -> Iterator[tuple[str, bytes]]:
    """File name → content of everything in book/_static/play/data."""
    nano, folder = root / "lora_course" / "data" / "nano", root / "book" / "_data" / "play"
    adapters: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        adapters |= {f"{path.stem}/{key}": entry for key, entry in tensors(path).items()}
    bundles, size = {}, 0
    for name, content in (("nano", tensors(nano / "model.safetensors")), ("adapters", adapters)):
        bundles[name], scripts = bundle(name, content)
        size += sum(len(script) for script in scripts.values())
        yield from scripts.items()
    words = f"receivePlayData('tokenizer', 0, {compact(tokenizer(nano / 'tokenizer.json'))});\n"
    yield "tokenizer-0.js", words.encode()
    index = {
        "config": json.loads((nano / "config.json").read_text()),
        "record": json.loads((folder / "record.json").read_text()),
        "samples": json.loads((folder / "samples.json").read_text()),
        "bundles": bundles,
        "bytes": size + len(words.encode()),
    }
    yield "index.js", f"const PLAY = {compact(index)};\n".encode()


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
