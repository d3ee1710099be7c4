"""Eleven systems built on LoRA, each in a room of its own.

    from lora_course import inject, save_adapter, export_peft

Names are imported when they are first used, so that `import lora_course` stays quick. A variant is a module:
`from lora_course import adalora`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_course.arguments import training_arguments
    from lora_course.checkpoint import load_adapter, restore_adapter, save_adapter
    from lora_course.export import export_peft, load_peft
    from lora_course.injection import (
        adapter_layers,
        disabled,
        inject,
        merge,
        trainable_parameters,
        unload,
        unmerge,
    )
    from lora_course.lora import LoRALinear
    from lora_course.states import (
        adapter_state,
        concatenate,
        factor_state,
        split_state,
        truncate,
        use_adapter,
    )
    from lora_course.training import AdapterTrainer

# On CPUs with AVX512-BF16 bitsandbytes asks, at its import, for a package whose kernels `qlora.protect` keeps out.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOMES = {
    "checkpoint": ("load_adapter", "restore_adapter", "save_adapter"),
    "export": ("export_peft", "load_peft"),
    "injection": (
        "adapter_layers",
        "disabled",
        "inject",
        "merge",
        "trainable_parameters",
        "unload",
        "unmerge",
    ),
    "lora": ("LoRALinear",),
    "states": (
        "adapter_state",
        "concatenate",
        "factor_state",
        "split_state",
        "truncate",
        "use_adapter",
    ),
    "arguments": ("training_arguments",),
    "training": ("AdapterTrainer",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [*sorted(_HOME_OF), "__version__"]  # noqa: PLE0604
__version__ = importlib.metadata.version("lora-course")


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"lora_course.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'lora_course' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOME_OF]
