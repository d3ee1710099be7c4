"""PEFT's adapter folder, both ways: `adapter_model.safetensors` and `adapter_config.json`, vanilla LoRA.

Whatever a layer did, its `factors()` are written.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file, save
from torch import nn

from lora_course.files import make_folder, replace_file
from lora_course.injection import adapter_layers, inject, injection_of, unload
from lora_course.lora import AdapterState
from lora_course.states import factor_state, split_state, use_adapter


def export_peft(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapter as a vanilla LoRA adapter that `PeftModel.from_pretrained` loads with equal logits.

    Ranks and scales that differ between modules go into `rank_pattern` and `alpha_pattern`; modules of rank 0 are
    left out, since PEFT refuses them.

    Raises:
        TypeError or NotImplementedError: the layer's update is not a low-rank matrix; from its `factors()`.
        ValueError: no module of rank ≥ 1 is left.
    """
    info = injection_of(model)
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
