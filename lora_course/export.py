"""PEFT's adapter folder, both ways: `adapter_model.safetensors` and `adapter_config.json`, vanilla LoRA.

Whatever a layer did, its `factors()` are written. PEFT reads any such folder right. Servers read less of it:

    | reads                 | default form                                             | `uniform=True` |
    |---|---|---|
    | PEFT                  | right                                                    | right          |
    | vLLM                  | one α/r for all: right where one scale holds for all     | right          |
    | llama.cpp (converted) | one α over each tensor's own rank: right at one rank     | right          |
    | TGI, LoRAX            | one α/r, one rank, each layer type in all blocks or none | right          |

The rules are those of the tools' own source, applied to exports in `tests/test_servers.py`. For Ollama: `merge`, `unload`,
`save_pretrained`, and convert the whole model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save
from torch import Tensor, nn

from lora_course.files import make_folder, replace_file, replace_files, writing
from lora_course.folders import read_peft
from lora_course.injection import (
    adapter_layers,
    inject,
    injection_of,
    unload,
    unwrapped,
    warn_of_what_is_left,
)
from lora_course.linears import is_4bit, is_sharded
from lora_course.lora import AdapterState
from lora_course.states import check_finite, factor_state, split_state, use_adapter

CARD = """---
base_model: {base}
library_name: peft
tags: [lora]
---

A LoRA adapter, made as `{layer}` with {settings}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, "this folder")
```
"""


def export_peft(
    model: nn.Module,
    folder: str | Path,
    uniform: bool = False,
    base_model_name_or_path: str | None = None,
) -> Path:
    """Write the adapter as a vanilla LoRA adapter that `PeftModel.from_pretrained` loads with equal logits.

    Args:
        model: injected; a base in bf16 that computes without autocast adds the update in bf16, where PEFT adds it in
            fp32: then "equal" means equal to bf16's rounding.
        folder: made if it is missing; other files in it are left alone. A model card (README.md) is added if none is there.
        uniform: one rank (the largest), one scale, and every block's module of each layer type, with zeros where there
            was nothing: what servers read right, see this module's table. By default ranks and scales that differ go into
            `rank_pattern` and `alpha_pattern`, and modules of rank 0 are left out, since PEFT refuses them.
        base_model_name_or_path: what the folder says the base is; the name it was loaded under by default.

    Raises:
        TypeError or NotImplementedError: the layer's update is not a low-rank matrix; from its `factors()`.
        ValueError: no module of rank ≥ 1 is left, or NaN or infinite numbers.
    """
    info = injection_of(model)
    state = factor_state(model)
    check_finite(state)
    warn_of_what_is_left(model, folder)
    modules = {name: t for name, t in split_state(state).items() if t["A"].shape[0] > 0}
    if not modules:
        raise ValueError("Every module of this adapter has rank 0: there is nothing to export.")
    if uniform:
        modules = _uniform(modules, _same_type(model, modules))
    ranks = {name: t["A"].shape[0] for name, t in modules.items()}
    alphas = {
        name: _whole_if_close(float(t["scaling"]) * ranks[name]) for name, t in modules.items()
    }
    # The largest rank, which servers check against their limit; and the α that goes with it at the commonest scale, so
    # that a server with one α/r for all is right wherever the scale is one for all.
    r, scales = max(ranks.values()), Counter(float(t["scaling"]) for t in modules.values())
    alpha = _whole_if_close(scales.most_common(1)[0][0] * r)
    name = base_model_name_or_path or getattr(unwrapped(model), "name_or_path", None)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT says int and takes any number
        lora_dropout=info.config.lora_dropout,
        target_modules=_targets(model, modules),
        rank_pattern={_exact(name, modules): rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={
            _exact(name, modules): value for name, value in alphas.items() if value != alpha
        },
        task_type=info.config.task_type,
        base_model_name_or_path=name or info.config.base_model_name_or_path,
        inference_mode=True,
    )
    tensors = {
        f"base_model.model.{name}.lora_{key}.weight": t[key].cpu().contiguous()
        for name, t in modules.items()
        for key in ("A", "B")
    }
    folder = Path(folder)
    if is_sharded(model) and torch.distributed.get_rank():
        return folder
    with writing(make_folder(folder)):
        text = json.dumps(_fields(config), indent=2, sort_keys=True)
        weights = save(tensors, metadata={"format": "pt"})
        replace_files(
            {
                folder / "adapter_model.safetensors": weights,
                folder / "adapter_config.json": text.encode(),
            }
        )
        if not (folder / "README.md").exists():
            card = _card(config, info.layer.__name__, uniform)
            replace_file(folder / "README.md", card.encode())
    return folder


def load_peft(model: nn.Module, folder: str | Path) -> nn.Module:
    """Inject into the plain `model` a LoRA adapter that PEFT saved, ready to use or to train on.

    Raises:
        FileNotFoundError: no `adapter_model.safetensors` there.    ValueError: another method than LoRA, a field or
        tensor that `LoRALinear` has no place for. The model is then as it was.
    """
    config, state = read_peft(Path(folder))
    config.inference_mode = False
    inject(model, config)
    try:
        return use_adapter(model, state)
    except Exception:
        unload(model)
        raise


def _uniform(
    modules: dict[str, AdapterState], shapes: dict[str, tuple[int, int]]
) -> dict[str, AdapterState]:
    """The same updates at one rank and one scale, with zeros for what is only in `shapes` ((out, in) by name)."""
    r = max(tensors["A"].shape[0] for tensors in modules.values())
    scales = {float(tensors["scaling"]) for tensors in modules.values()}
    common = scales.pop() if len(scales) == 1 else None
    if common is None or not float(_whole_if_close(common * r)).is_integer():
        common = 1.0  # then α = r, a whole number, and each module's own scale goes into its B
    found = {}
    for name, (out, width) in shapes.items():
        A, B = torch.zeros(r, width), torch.zeros(out, r)
        if name in modules:
            rank = modules[name]["A"].shape[0]
            A[:rank] = modules[name]["A"].cpu()
            B[:, :rank] = modules[name]["B"].cpu() * (float(modules[name]["scaling"]) / common)
        found[name] = {"A": A, "B": B, "scaling": torch.tensor(common, dtype=torch.float64)}
    return found


def _same_type(model: nn.Module, modules: dict[str, AdapterState]) -> dict[str, tuple[int, int]]:
    """(out, in) of all linear layers that are called as one of `modules` is, adapted or not, in the model's order."""
    layers = adapter_layers(model)
    endings = {name.rpartition(".")[2] for name in modules}
    return {
        name: (module.out_features, module.in_features)
        for name, module in _plain_names(model)
        if name.rpartition(".")[2] in endings
        and (name in layers or isinstance(module, nn.Linear) or is_4bit(module))
    }


def _plain_names(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules by the names that they have where nothing is compiled."""
    for name, module in unwrapped(model).named_modules():
        yield name.replace("_orig_mod.", ""), module


def _targets(model: nn.Module, modules: dict[str, dict[str, Tensor]]) -> list[str] | str:
    """The exported modules by their last names where these mean the same, else by full names; as an expression where
    one's name is the end of another module's, which PEFT would take too."""
    names = [name for name, _ in _plain_names(model)]
    names = [name.removesuffix(".base_layer") for name in names]

    def taken(targets: set[str]) -> set[str]:
        return {n for n in names if any(n == t or n.endswith(f".{t}") for t in targets)}

    for targets in ({name.rpartition(".")[2] for name in modules}, set(modules)):
        if taken(targets) == modules.keys():
            return sorted(targets)
    return "|".join(re.escape(name) for name in sorted(modules))


def _exact(name: str, modules: Iterable[str]) -> str:
    """`name` as a key of a pattern: anchored where it is the end of another module's name."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in modules) else name


def _whole_if_close(value: float) -> int | float:
    """An integer where `value` is one to float64's rounding: some readers of α take no other number."""
    return round(value) if abs(value - round(value)) < 1e-9 * max(1.0, value) else value


def _fields(config: LoraConfig) -> dict[str, object]:
    found = config.to_dict()
    return {
        k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in found.items()
    }


def _card(config: LoraConfig, layer: str, uniform: bool) -> str:
    settings = f"r = {config.r}, α = {config.lora_alpha}"
    if uniform:
        settings += ", one rank and one scale in every module"
    elif config.rank_pattern or config.alpha_pattern:
        settings += ", ranks or scales that differ between modules (rank_pattern, alpha_pattern)"
    return CARD.format(base=config.base_model_name_or_path or "", layer=layer, settings=settings)
