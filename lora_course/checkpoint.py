"""Saving and loading an adapter in the course's own format: all that is needed to go on training.

    adapter.safetensors   the adapter's tensors, `<module>.A` `[r, in]`, `<module>.B` `[out, r]`, `<module>.scaling`, …
    adapter.json          format version, layer, configuration, layer arguments, shapes, extra state, hashes

Neither pickle nor an import by name. PEFT's format is in `export`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import warnings
from pathlib import Path

from peft import AdaLoraConfig, LoraConfig
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lora_course.files import make_folder, replace_file
from lora_course.injection import adapter_layers, inject, injection_of, unload
from lora_course.lora import LAYERS, LoRALinear
from lora_course.states import adapter_state, use_adapter

FORMAT_VERSION = 1
CONFIGS = {"LoraConfig": LoraConfig, "AdaLoraConfig": AdaLoraConfig}
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
    model: nn.Module, folder: str | Path, extra: dict[str, object] | None = None
) -> Path:
    """Write the adapter of `model` to `folder`; each file is complete before it replaces an older one.

    Args:
        model: an injected model, merged or not: the factors are saved either way, the base never.
        folder: made if it is missing; other files in it are left alone.
        extra: what an algorithm needs to go on, as JSON; `read_extra` gives it back.

    Returns:
        `folder` as a path.
    """
    info, layers = injection_of(model), adapter_layers(model)
    tensors = save(
        {name: tensor.cpu().contiguous() for name, tensor in adapter_state(model).items()}
    )
    description = {
        "format_version": FORMAT_VERSION,
        "layer": info.layer.__name__,
        "config_class": type(info.config).__name__,
        "config": {
            name: _jsonable(value) for name, value in _fields(info.config, info.layer).items()
        },
        "arguments": info.arguments,
        "shapes": {name: [layer.out_features, layer.in_features] for name, layer in layers.items()},
        "base": {
            "name": getattr(model, "name_or_path", ""),
            "fingerprint": base_fingerprint(layers),
        },
        "extra": extra or {},
        "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
    }
    text = json.dumps(description, indent=1)
    folder = make_folder(folder)
    replace_file(folder / "adapter.safetensors", tensors)
    replace_file(folder / "adapter.json", text.encode())
    return folder


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Inject into the plain `model` what `save_adapter` wrote, ready to use or to train on.

    Raises:
        FileNotFoundError: no adapter there.    ValueError: made by a later version, with an unknown layer, torn, or
        for other modules or shapes than the model's. The model is then as it was.

    Warns:
        UserWarning: the base's weights are not those the adapter was trained on (4-bit to bf16 is a legitimate case).
    """
    description = _describe(folder)
    config = CONFIGS[description["config_class"]](**description["config"])
    inject(model, config, _layer(description["layer"]), **description["arguments"])
    try:
        return restore_adapter(model, folder)
    except Exception:
        unload(model)
        raise


def restore_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put what `save_adapter` wrote into a `model` that is injected already. Raises and warns as `load_adapter`."""
    description = _describe(folder)
    layers = adapter_layers(model)
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
    found, expected = base_fingerprint(layers), description["base"]["fingerprint"]
    if found and expected and found != expected:
        warnings.warn(
            f"The base's weights are not those that the adapter in {folder} was trained on "
            f"({description['base']['name']!r}). That is expected when a 4-bit base is replaced by its 16-bit original.",
            stacklevel=2,
        )
    return use_adapter(model, load_file(Path(folder) / "adapter.safetensors"))


def read_extra(folder: str | Path) -> dict[str, object]:
    """The `extra` that `save_adapter` was given."""
    return _describe(folder)["extra"]


def _describe(folder: str | Path) -> dict:
    folder = Path(folder)
    path, tensors = folder / "adapter.json", folder / "adapter.safetensors"
    for file in (path, tensors):
        if not file.is_file():
            hint = (
                " It holds a PEFT adapter: use load_peft."
                if (folder / "adapter_config.json").is_file()
                else ""
            )
            raise FileNotFoundError(
                f"{file} does not exist: a folder written by save_adapter is expected.{hint}"
            )
    description = json.loads(path.read_text())
    if description["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {description['format_version']}, this package reads {FORMAT_VERSION}: update lora-course."
        )
    if description["layer"] not in LAYERS and description["layer"] not in HOMES:
        raise ValueError(
            f"{path} needs the layer {description['layer']!r}, which is none of this package's {sorted(HOMES)}: "
            "import the module that registers it first."
        )
    if hashlib.sha256(tensors.read_bytes()).hexdigest() != description["tensors_sha256"]:
        raise ValueError(
            f"{tensors} is not the file that {path.name} describes: a save was cut short, or a file was exchanged."
        )
    return description


def _layer(name: str) -> type[LoRALinear]:
    if name not in LAYERS:
        importlib.import_module(f"lora_course.{HOMES[name]}")
    return LAYERS[name]


def _fields(config: LoraConfig, layer: type[LoRALinear]) -> dict[str, object]:
    derived = {"peft_type", "peft_version", "auto_mapping"}
    names = {
        field.name for field in dataclasses.fields(config) if field.init
    } & layer.supported_fields - derived
    return {name: getattr(config, name) for name in sorted(names)}


def _jsonable(value: object) -> object:
    return sorted(value) if isinstance(value, set) else getattr(value, "value", value)


def base_fingerprint(layers: dict[str, LoRALinear]) -> str | None:
    """A hash of a sample of the base weights under the adapter: equal for equal values in fp32, bf16 or fp16."""
    if any(layer.merged or layer.base_layer.weight.is_meta for layer in layers.values()):
        return None
    digest = hashlib.sha256()
    for layer in layers.values():
        weight: Tensor = layer.base_layer.weight.detach().flatten()
        digest.update(weight[:: max(1, weight.numel() // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()
