"""An adapter on disk as packed integers and scales."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from lora_course.descriptions import base_fingerprint, describe_base, warn_of_another_base
from lora_course.files import make_folder, replace_file
from lora_course.injection import inject, injection_of, layers_of, unload
from lora_course.linears import check_not_sharded
from lora_course.lora import AdapterState
from lora_course.quantized.grid import check_grid, dequantize, pack, quantize, unpack
from lora_course.quantized.layer import QuantizedLoRALinear
from lora_course.states import use_adapter

FORMAT_VERSION = 1
FILE = "quantized.safetensors"
LAYER_FIELDS = ("out_features", "in_features", "r", "lora_alpha", "scaling")


def save_quantized(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapter of `model` to `folder/quantized.safetensors` as packed integers and scales; the base is not in it.

    One file: `<module>.A.codes` and `<module>.B.codes` uint8 (see `pack`; rows are components, so B is transposed),
    `….scale` fp32; a factor with 32 bits as it is, `<module>.A`, `<module>.B`. What it takes to read them stands in the
    file's metadata. Modules of rank 0 are left out. To go on training, keep the fp32 parameters too: `save_adapter`.

    Returns:
        The file's path.

    Raises:
        ValueError: other layers than `QuantizedLoRALinear`, factors that are not finite, or none.    RuntimeError: FSDP2 has
        spread the model.
    """
    info = injection_of(model)
    check_not_sharded(model, "save_quantized")
    if info.layer is not QuantizedLoRALinear:
        raise ValueError(
            f"This model was injected with {info.layer.__name__}: call quantize_after_training(model, bits=…) first, or use save_adapter."
        )
    # Modules of rank 0 change nothing, and no configuration has them.
    layers = {name: t for name, t in layers_of(model, QuantizedLoRALinear).items() if len(t.A)}
    if not layers:
        raise ValueError("Every module of this adapter has rank 0: there is nothing to save.")
    tensors: AdapterState = {}
    for name, layer in layers.items():
        for key, rows, bits in (("A", layer.A, layer.bits_A), ("B", layer.B.T, layer.bits_B)):
            rows = rows.detach().float().cpu()
            if not rows.isfinite().all():
                raise ValueError(
                    f"{name}.{key} is not finite, so it has no scale: the training has diverged. Nothing was written."
                )
            if bits == 32:
                tensors[f"{name}.{key}"] = rows.contiguous()
                continue
            codes, scale = quantize(rows, bits, layer.granularity, layer.group_size, layer.clip)
            tensors |= {f"{name}.{key}.codes": pack(codes, bits), f"{name}.{key}.scale": scale}
    first = next(iter(layers.values()))
    description = {
        "format_version": FORMAT_VERSION,
        "grid": {
            key: getattr(first, key) for key in ("bits_A", "bits_B", "granularity", "group_size")
        },
        "use_rslora": first.use_rslora,
        "layers": {
            name: {key: getattr(layer, key) for key in LAYER_FIELDS}
            for name, layer in layers.items()
        },
        "base": describe_base(model) | {"fingerprint": base_fingerprint(layers)},
        "tensors_sha256": _hash_of(tensors),
    }
    path = make_folder(folder) / FILE
    replace_file(path, save(tensors, metadata={"lora_course": json.dumps(description)}))
    return path


def load_quantized(model: nn.Module, folder: str | Path) -> nn.Module:
    """Inject into the plain `model` what `save_quantized` wrote, as plain `LoRALinear` with factors codes · scale.

    They are the factors that the saved model computed with, bit for bit up to 8 bits, and are not rounded again.

    Raises:
        FileNotFoundError: no such file.    ValueError: no file of `save_quantized`, a later version, damaged, or for other
        modules or shapes than the model's. The model is then as it was.

    Warns:
        UserWarning: the base's weights are not those the adapter was trained on.
    """
    path = Path(folder) / FILE
    description, tensors = _read_file(path)
    try:
        config, state = _decode(description, tensors)
        description["base"]["fingerprint"], description["base"]["name"]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:  # fmt: skip
        raise ValueError(
            f"{path} describes other tensors than it holds ({type(error).__name__}: {error}): it was edited. Take another copy."
        ) from None
    inject(model, config)
    try:
        use_adapter(model, state)
    except Exception:
        unload(model)
        raise
    warn_of_another_base(model, description["base"], folder)
    return model


def _decode(description: dict, tensors: AdapterState) -> tuple[LoraConfig, AdapterState]:
    """The configuration and the factors codes · scale of a file. Raises whatever a wrong description leads to."""
    grid, layers = description["grid"], description["layers"]
    for bits in (grid["bits_A"], grid["bits_B"]):
        check_grid(bits, grid["granularity"], grid["group_size"], clip=1)
    state: AdapterState = {}
    for name, layer in layers.items():
        state[f"{name}.scaling"] = torch.tensor(layer["scaling"], dtype=torch.float64)
        for key, length, bits in (
            ("A", layer["in_features"], grid["bits_A"]),
            ("B", layer["out_features"], grid["bits_B"]),
        ):
            if bits == 32:
                rows = tensors[f"{name}.{key}"]
            else:
                codes = unpack(tensors[f"{name}.{key}.codes"], bits, (layer["r"], length))
                rows = dequantize(
                    codes, tensors[f"{name}.{key}.scale"], grid["granularity"], grid["group_size"]
                )
            state[f"{name}.{key}"] = rows if key == "A" else rows.T.contiguous()
    first = list(layers.values())[0]  # an IndexError where there is none
    config = LoraConfig(
        r=first["r"],
        lora_alpha=first["lora_alpha"],
        use_rslora=bool(description["use_rslora"]),
        # an expression, since a name in a list stands for all modules that end with it
        target_modules="|".join(re.escape(name) for name in sorted(layers)),
        rank_pattern={
            f"^{re.escape(name)}": layer["r"]
            for name, layer in layers.items()
            if layer["r"] != first["r"]
        },
        alpha_pattern={
            f"^{re.escape(name)}": layer["lora_alpha"]
            for name, layer in layers.items()
            if layer["lora_alpha"] != first["lora_alpha"]
        },
    )
    return config, state


def _hash_of(tensors: AdapterState) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _read_file(path: Path) -> tuple[dict, AdapterState]:
    """The description and tensors of a file, checked."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: a folder written by save_quantized is expected."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = (
                file.metadata() or {},
                {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
            )
    except SafetensorError as error:
        raise ValueError(
            f"{path} can't be read ({error}): it is cut short or no safetensors file. Copy it again."
        ) from None
    if "lora_course" not in metadata:
        raise ValueError(f"{path} was not written by save_quantized: it describes no adapter.")
    try:
        description = json.loads(metadata["lora_course"])
        version, expected = description["format_version"], description["tensors_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} has a description that can't be read ({type(error).__name__}: {error}): it was edited. Take another copy."
        ) from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, this package reads {FORMAT_VERSION}: update lora-course."
        )
    if _hash_of(tensors) != expected:
        raise ValueError(
            f"{path} is damaged: its tensors are not those that it describes. Copy it again."
        )
    return description, tensors
