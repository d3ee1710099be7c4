"""Adapter folders as plain states, without a model: what mixing, teaching and serving take besides states."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from torch import nn

from lora_course.checkpoint import DESCRIPTION, read_description, read_tensors
from lora_course.descriptions import warn_of_another_base
from lora_course.files import read_tensor_file
from lora_course.injection import unwrapped
from lora_course.lora import AdapterState, LoRALinear
from lora_course.states import check_finite, relative_error, split_state
from lora_course.targets import check_names, check_supported

STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that draw factors alone and leave the base as it is."""


def read_factors(adapter: AdapterState | str | Path) -> AdapterState:
    """The plain factors of a folder that `save_adapter`, `export_peft` or PEFT wrote; a state is checked and given back.

    Raises:
        FileNotFoundError: no adapter there.    ValueError: a layer whose tensors are no plain factors, or another method
        than LoRA; numbers that are NaN or infinite.    TypeError: neither a state nor the name of a folder.
    """
    if isinstance(adapter, Mapping):
        split_state(adapter)
        check_finite(adapter)
        return dict(adapter)
    if not isinstance(adapter, str | Path):
        raise TypeError(
            f"An adapter is given as a {type(adapter).__name__}: factor_state(model), or the folder of one, is expected."
        )
    folder = Path(adapter)
    exported = read_peft(folder)[1] if (folder / "adapter_config.json").is_file() else None
    if exported is not None and not (folder / DESCRIPTION).is_file():
        return exported
    layer = read_description(folder)["layer"]
    state = read_tensors(folder)
    check_finite(state)
    if exported is not None:
        plain = all(set(t) == {"A", "B", "scaling"} for t in split_state(state).values())
        if plain and not relative_error(exported, state) < 1e-3:
            raise ValueError(
                f"{folder} holds two adapters that differ: the one of save_adapter ({DESCRIPTION}) and an export "
                "(adapter_config.json). One of them is older: delete it, or export again."
            )
        return exported
    if any(set(tensors) != {"A", "B", "scaling"} for tensors in split_state(state).values()):
        raise ValueError(
            f"{folder} holds a {layer}, whose tensors are no plain factors: load_adapter it into a base, and give "
            "factor_state of that model, or a folder by export_peft."
        )
    return state


def warn_of_its_base(
    model: nn.Module, adapter: AdapterState | str | Path, layers: Mapping[str, LoRALinear]
) -> None:
    """Warn as `load_adapter` does, for an adapter that `read_factors` read; a state, and PEFT's folder, say nothing of their base.

    layers: those of this adapter, by name.
    """
    if not isinstance(adapter, str | Path) or not (Path(adapter) / DESCRIPTION).is_file():
        return
    in_order = {
        name: layers[name] for name, _ in unwrapped(model).named_modules() if name in layers
    }
    warn_of_another_base(model, read_description(adapter)["base"], adapter, in_order)


def read_peft(folder: Path) -> tuple[LoraConfig, AdapterState]:
    """Configuration and plain factors of a LoRA folder that PEFT wrote. Raises as `read_factors`."""
    path = folder / "adapter_model.safetensors"
    for file in (path, folder / "adapter_config.json"):
        if not file.is_file():  # PEFT would look for the configuration on the hub
            raise FileNotFoundError(
                f"{file} does not exist: a folder written by PEFT's save_pretrained (safetensors) is expected."
            )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever PEFT makes of a field that it did not write
        raise ValueError(
            f"{folder / 'adapter_config.json'} is no configuration that PEFT reads ({type(error).__name__}: {error}): it was "
            "cut short or edited. Take another copy of the folder."
        ) from None
    if type(config) is not LoraConfig:
        raise ValueError(f"{folder} holds a {config.peft_type} adapter; plain LoRA is expected.")
    _check_scales(config, folder)
    start = config.init_lora_weights
    if (start.lower() if isinstance(start, str) else start) not in STARTS:
        raise ValueError(
            f"{folder} was started by init_lora_weights={start!r}, which changes the base's weights too: its factors alone are "
            "another function. Save it by PEFT's path_initial_model_for_weight_conversion, which makes it plain LoRA, or load it with PEFT."
        )
    # How the factors started says nothing of what they are now.
    if start != "gaussian":
        config.init_lora_weights, config.eva_config = True, None
    check_supported(config, LoRALinear)
    state: AdapterState = {}
    for key, tensor in read_tensor_file(path).items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight")
        module, _, factor = name.rpartition(".")
        if factor not in ("lora_A", "lora_B") or not key.endswith(".weight"):
            raise ValueError(
                f"{path} holds {key!r}, which is no factor of a linear layer: load this adapter with PEFT."
            )
        state[f"{module}.{factor.removeprefix('lora_')}"] = tensor
    check_finite(state)
    alphas, ranks = config.alpha_pattern or {}, config.rank_pattern or {}
    for module, factors in split_state(state).items():
        alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
        r = ranks.get(get_pattern_key(list(ranks), module), config.r)
        ranks_there = {t.shape[0 if key == "A" else -1] for key, t in factors.items()}
        if ranks_there != {r}:
            raise ValueError(
                f"{module!r} has factors of rank {sorted(ranks_there)}, and adapter_config.json says {r}, so that the scale α/r is not "
                "theirs: the folder was edited. Take another copy."
            )
        scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
        state[f"{module}.scaling"] = torch.tensor(scaling, dtype=torch.float64)
    return config, state


def _check_scales(config: LoraConfig, folder: Path) -> None:
    """Raise ValueError where ranks or α are no positive numbers."""
    check_names(config)
    given = {"r": config.r, "lora_alpha": config.lora_alpha}
    for field in ("rank_pattern", "alpha_pattern"):
        given |= {
            f"{field}[{name!r}]": value for name, value in (getattr(config, field) or {}).items()
        }
    for name, value in given.items():
        if not isinstance(value, numbers.Real) or not 0 < value < math.inf:
            raise ValueError(
                f"{folder / 'adapter_config.json'} has {name}={value!r}; a positive number is expected: it was edited."
            )
