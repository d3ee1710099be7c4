"""Saving and loading an adapter in the course's own format: all that is needed to go on training.

    adapter.safetensors   the adapter's tensors, `<module>.A` `[r, in]`, `<module>.B` `[out, r]`, `<module>.scaling`, …
    adapter.json          format version, layer, configuration, layer arguments, shapes, extra state, hashes

Neither pickle nor an import by name. PEFT's format is in `export`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig
from safetensors.torch import save
from torch import nn

from lora_course.descriptions import (
    describe_adapter,
    describe_base,
    differences,
    warn_of_another_base,
)
from lora_course.files import make_folder, read_json, read_tensor_file, replace_file, writing
from lora_course.injection import adapter_layers, inject, unload, warn_of_what_is_left
from lora_course.linears import is_sharded
from lora_course.lora import LAYERS, AdapterState, LoRALinear
from lora_course.states import adapter_state, check_finite, use_adapter

FORMAT_VERSION = 1
DESCRIPTION, TENSORS = "adapter.json", "adapter.safetensors"
KEPT = "adapter.previous.safetensors"
"""The tensors that a description belongs to while a save is under way, or after one that was killed."""
CONFIGS = {"LoraConfig": LoraConfig, "AdaLoraConfig": AdaLoraConfig}
EXPECTED = {
    "layer": str, "config_class": str, "config": dict, "arguments": dict, "shapes": dict, "base": dict, "extra": dict,
    "tensors_sha256": str,
}  # fmt: skip
"""What a description has to hold, as JSON."""
HOMES = {
    "AdaLoRALinear": "adalora",
    "ExpertsLinear": "experts",
    "FusedLoRALinear": "fused",
    "GatedLoRALinear": "sparse",
    "GrowingLoRALinear": "adaptive",
    "NestedLoRALinear": "hierarchical",
    "OrthogonalLoRALinear": "continual",
    "QuantizedLoRALinear": "quantized",
    "SparseDeltaLinear": "sparse",
    "SparseLoRALinear": "sparse",
    "StackedLoRALinear": "progressive",
}
"""The module of each layer of this package: a checkpoint may ask for it before anyone has imported it."""


def save_adapter(
    model: nn.Module, folder: str | Path, extra: Mapping[str, Any] | None = None
) -> Path:
    """Write the adapter of `model` to `folder`, whole or not at all: until the last step, what was there is loaded.

    Args:
        model: an injected model, merged or not: the factors are saved either way, the base never.
        folder: made if it is missing; other files in it are left alone.
        extra: what an algorithm needs to go on, as JSON; `read_extra` gives it back.

    Returns:
        `folder` as a path.

    Raises:
        ValueError: NaN or infinite numbers, or an argument that JSON has no form for. Nothing has been written then.

    Warns:
        UserWarning: a parameter besides the adapter's requires a gradient: it is not written.

    Under FSDP2 every process calls this, since each holds a part of the tensors; the first one writes.
    """
    layers = adapter_layers(model)
    state = adapter_state(model)
    check_finite(state)
    warn_of_what_is_left(model, folder)
    tensors = save({name: tensor.cpu().contiguous() for name, tensor in state.items()})
    description = {
        "format_version": FORMAT_VERSION,
        **describe_adapter(model),
        "shapes": {name: [layer.out_features, layer.in_features] for name, layer in layers.items()},
        "base": describe_base(model),
        "extra": dict(extra or {}),
        "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
    }
    try:
        text = json.dumps(description, indent=1)
    except TypeError as error:
        raise ValueError(
            f"This adapter's description has a value that JSON can't hold ({error}): give layer arguments and `extra` as "
            "numbers, strings, lists and dictionaries."
        ) from None
    folder = Path(folder)
    if not is_sharded(model) or torch.distributed.get_rank() == 0:
        with writing(make_folder(folder)):
            _replace(folder, tensors, text.encode())
    return folder


def _replace(folder: Path, tensors: bytes, description: bytes) -> None:
    """Replace both files. In between the old description stands beside the new tensors; the old ones are kept until then."""
    file, kept = folder / TENSORS, folder / KEPT
    if not kept.exists() or not _described(folder, kept):
        kept.unlink(missing_ok=True)
        if file.exists():
            _link(file, kept)
    replace_file(file, tensors)
    replace_file(folder / DESCRIPTION, description)
    kept.unlink(missing_ok=True)


def _link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # a file system without links
        shutil.copyfile(file, name)


def _described(folder: Path, tensors: Path) -> bool:
    """Whether `tensors` is the file that the folder's description was written with."""
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        return hashlib.sha256(tensors.read_bytes()).hexdigest() == description["tensors_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Inject into the plain `model` what `save_adapter` wrote, ready to use or to train on.

    Raises:
        FileNotFoundError: no adapter there.    ValueError: made by a later version, with an unknown layer, torn, or
        for other modules or shapes than the model's. The model is then as it was.

    Warns:
        UserWarning: the base's weights are not those the adapter was trained on (4-bit to bf16 is a legitimate case).
    """
    description = read_description(folder)
    try:
        config = CONFIGS[description["config_class"]](**description["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{Path(folder) / DESCRIPTION} has a configuration that PEFT does not take ({error}): it was edited, or written "
            "with another version of PEFT."
        ) from None
    inject(model, config, _layer(description["layer"]), **description["arguments"])
    try:
        return restore_adapter(model, folder)
    except Exception:
        unload(model)
        raise


def restore_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put what `save_adapter` wrote into a `model` that is injected already, with the same layer and configuration.

    Raises and warns as `load_adapter`; ValueError also where the model was injected in another way than the adapter.
    """
    description = read_description(folder)
    layers, asked = adapter_layers(model), describe_adapter(model)
    if found := differences({key: description[key] for key in asked}, asked):
        raise ValueError(
            f"The adapter in {folder} is another than the model was injected for: {'; '.join(found)}. "
            "Inject as it was, or load_adapter it into a plain base."
        )
    shapes = {name: [layer.out_features, layer.in_features] for name, layer in layers.items()}
    if shapes != description["shapes"]:
        differing = sorted(
            name
            for name in shapes | description["shapes"]
            if shapes.get(name) != description["shapes"].get(name)
        )
        first = differing[0]
        raise ValueError(
            f"The adapter in {folder} is for another base: {first!r} is {description['shapes'].get(first, 'absent')} "
            f"([out, in]) in the adapter and {shapes.get(first, 'absent')} in the model; {len(differing)} modules differ. "
            f"It was made on {description['base']['name']!r}: load that base."
        )
    tensors = read_tensors(Path(folder))
    warn_of_another_base(model, description["base"], folder)
    return use_adapter(model, tensors)


def read_extra(folder: str | Path) -> dict[str, object]:
    """The `extra` that `save_adapter` was given."""
    return read_description(folder)["extra"]


def read_description(folder: str | Path) -> dict[str, Any]:
    """What `adapter.json` says, checked: format, layer, and that its tensors are there. Raises as `load_adapter`."""
    folder = Path(folder)
    path = folder / DESCRIPTION
    for file in (path, folder / TENSORS):
        if not file.is_file():
            hint = ""
            if (folder / "adapter_config.json").is_file():
                hint = " It holds a PEFT adapter: use load_peft."
            raise FileNotFoundError(
                f"{file} does not exist: a folder written by save_adapter is expected.{hint}"
            )
    try:
        description = read_json(path)
        version, layer = description["format_version"], description["layer"]
        for name, kind in EXPECTED.items():
            if not isinstance(description[name], kind):
                raise TypeError(f"{name} is {description[name]!r}")
        description["base"]["fingerprint"], description["base"]["name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no description of an adapter ({type(error).__name__}: {error}): it was cut short or edited. "
            "Take another copy of the folder."
        ) from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, this package reads {FORMAT_VERSION}: update lora-course."
        )
    if layer not in LAYERS and layer not in HOMES:
        raise ValueError(
            f"{path} needs the layer {layer!r}, which is none of this package's {sorted(HOMES)}: "
            "import the module that registers it first."
        )
    if description["config_class"] not in CONFIGS:
        raise ValueError(
            f"{path} has a configuration of class {description['config_class']!r}; {sorted(CONFIGS)} are known."
        )
    return description


def read_tensors(folder: Path) -> AdapterState:
    """The tensors that the folder's description belongs to. Raises ValueError where there are none."""
    for name in (TENSORS, KEPT):
        if (folder / name).is_file() and _described(folder, folder / name):
            return read_tensor_file(folder / name)
    raise ValueError(
        f"{folder / TENSORS} is not the file that {DESCRIPTION} describes: a file was exchanged or cut short. "
        "Take another copy of the folder."
    )


def _layer(name: str) -> type[LoRALinear]:
    if name not in LAYERS:
        importlib.import_module(f"lora_course.{HOMES[name]}")
    return LAYERS[name]
