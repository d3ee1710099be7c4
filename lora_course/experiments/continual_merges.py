"""Of the study of chapter 3.3: several adapters in one, by our merging and by PEFT's, which works on the factors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lora_course.experiments.arms import config_of, in_peft
from lora_course.lora import AdapterState
from lora_course.merging import Merged, average_factors, dare, ties
from lora_course.states import concatenate, split_state, truncate


def merged_states(
    settings: Mapping[str, Any], states: Sequence[AdapterState], seed: int
) -> dict[str, AdapterState | Merged]:
    """One state of several, by method. All but "mean" and "sum" have rank r."""
    r, count, density = settings["r"], len(states), settings["ties_density"]
    mean, one = [1 / count] * count, [1.0] * count
    config = config_of(r, target_modules=sorted(split_state(states[0])))
    theirs = in_peft(settings, {str(i): state for i, state in enumerate(states)}, config)
    torch.manual_seed(seed)  # PEFT's DARE draws from the global generator
    drop = {"density": settings["dare_density"]}
    return {
        "mean": concatenate(states, mean),
        "sum": concatenate(states),
        "mean, cut to r": truncate(concatenate(states, mean), r),
        "sum, cut to r": truncate(concatenate(states), r),
        "TIES": ties(states, r, density),
        "DARE": dare(states, r, settings["dare_density"], mean, seed),
        "mean of the factors": average_factors(states),
        "PEFT linear": peft_merge(theirs, mean, "linear"),
        "PEFT ties": peft_merge(theirs, one, "ties", density=density),
        "PEFT dare_linear": peft_merge(theirs, mean, "dare_linear", **drop),
    }


def peft_merge(model: Any, weights: list[float], kind: str, **arguments: object) -> AdapterState:
    """What PEFT's add_weighted_adapter makes of the adapters, as a state."""
    names = [str(i) for i in range(len(weights))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.base_model.add_weighted_adapter(names, weights, kind, kind, **arguments)
    merged: AdapterState = {}
    for module, layer in model.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            merged[f"{module}.A"] = layer.lora_A[kind].weight.detach().clone()
            merged[f"{module}.B"] = layer.lora_B[kind].weight.detach().clone()
            merged[f"{module}.scaling"] = torch.tensor(layer.scaling[kind], dtype=torch.float64)
    model.base_model.delete_adapter(kind)
    return merged
