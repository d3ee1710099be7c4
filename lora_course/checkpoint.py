"""Saving and loading an adapter: the course's own format, and PEFT's.

Own format, everything needed to go on training, and neither pickle nor an import by name:

    adapter.safetensors   the adapter's tensors, `<module>.A` `[r, in]`, `<module>.B` `[out, r]`, `<module>.scaling`, …
    adapter.json          format version, layer, configuration, layer arguments, shapes, extra state, hashes

PEFT's format (`export_peft`, `load_peft`) is a vanilla LoRA adapter folder: `adapter_model.safetensors`,
`adapter_config.json`. Whatever a layer did, its `factors()` are written.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import warnings
from collections import Counter
from pathlib import Path

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lora_course.lora import (
    LAYERS,
    AdapterState,
    LoRALinear,
    adapter_layers,
    adapter_state,
    factor_state,
    inject,
    injection,
    split_state,
    unload,
    use_adapter,
)

FORMAT_VERSION = 1
CONFIGS = {"LoraConfig": LoraConfig, "AdaLoraConfig": AdaLoraConfig}


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
    info, layers = injection(model), adapter_layers(model)
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
    inject(model, config, LAYERS[description["layer"]], **description["arguments"])
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


def export_peft(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapter as a vanilla LoRA adapter that `PeftModel.from_pretrained` loads with equal logits.

    Ranks and scales that differ between modules go into `rank_pattern` and `alpha_pattern`; modules of rank 0 are
    left out, since PEFT refuses them.

    Raises:
        TypeError or NotImplementedError: the layer's update is not a low-rank matrix; from its `factors()`.
        ValueError: no module of rank ≥ 1 is left.
    """
    info = injection(model)
    modules = {
        name: t for name, t in split_state(factor_state(model)).items() if t["A"].shape[0] > 0
    }
    if not modules:
        raise ValueError("Every module of this adapter has rank 0: there is nothing to export.")
    ranks = {name: t["A"].shape[0] for name, t in modules.items()}
    alphas = {name: float(t["scaling"]) * ranks[name] for name, t in modules.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=info.config.lora_dropout,
        target_modules=sorted(modules),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
        task_type=info.config.task_type,
        base_model_name_or_path=getattr(model, "name_or_path", None)
        or info.config.base_model_name_or_path,
        inference_mode=True,
    )
    tensors = {
        f"base_model.model.{name}.lora_{key}.weight": t[key].cpu().contiguous()
        for name, t in modules.items()
        for key in ("A", "B")
    }
    folder = make_folder(folder)
    replace_file(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))
    config.save_pretrained(folder)
    return folder


def load_peft(model: nn.Module, folder: str | Path) -> nn.Module:
    """Inject into the plain `model` a LoRA adapter that PEFT saved, ready to use or to train on.

    Raises:
        FileNotFoundError: no `adapter_model.safetensors` there.    ValueError: another method than LoRA, a field or
        tensor that `LoRALinear` has no place for. The model is then as it was.
    """
    folder = Path(folder)
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: a folder written by PEFT's save_pretrained (safetensors) is expected."
        )
    config = PeftConfig.from_pretrained(str(folder))
    if type(config) is not LoraConfig:
        raise ValueError(
            f"{folder} holds a {config.peft_type} adapter; load_peft takes plain LoRA."
        )
    config.inference_mode = False
    if (
        config.init_lora_weights is False
    ):  # says how the factors started; they are about to be replaced
        config.init_lora_weights = True
    state: AdapterState = {}
    for key, tensor in load_file(path).items():
        module, _, name = (
            key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        )
        if name not in ("lora_A", "lora_B") or not key.endswith(".weight"):
            raise ValueError(
                f"{path} holds {key!r}, which is no factor of a linear layer: load this adapter with PEFT."
            )
        state[f"{module}.{name.removeprefix('lora_')}"] = tensor
    inject(model, config)
    try:
        for name, layer in adapter_layers(model).items():
            state[f"{name}.scaling"] = torch.tensor(layer.scaling, dtype=torch.float64)
        return use_adapter(model, state)
    except Exception:
        unload(model)
        raise


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
    if description["layer"] not in LAYERS:
        raise ValueError(
            f"{path} needs the layer {description['layer']!r}; known are {sorted(LAYERS)}. Import the module that defines it first."
        )
    if hashlib.sha256(tensors.read_bytes()).hexdigest() != description["tensors_sha256"]:
        raise ValueError(
            f"{tensors} is not the file that {path.name} describes: a save was cut short, or a file was exchanged."
        )
    return description


def _fields(config: LoraConfig, layer: type[LoRALinear]) -> dict[str, object]:
    derived = {"peft_type", "peft_version", "auto_mapping"}
    names = {
        field.name for field in dataclasses.fields(config) if field.init
    } & layer.honoured - derived
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


def make_folder(folder: str | Path) -> Path:
    """The folder as a path, made if it is not there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a stopped process leaves the old one."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
