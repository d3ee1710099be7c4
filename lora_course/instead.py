"""What an injected model does instead of its own methods, where those would do something else than they say."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lora_course.lora import LoRALinear
from lora_course.targets import output_head

REPLACED = (
    "save_pretrained",
    "push_to_hub",
    "add_adapter",
    "load_adapter",
    "resize_token_embeddings",
)


def replace_methods(model: nn.Module, layers: Mapping[str, LoRALinear]) -> None:
    """Sets, on the model object, what stands in for its methods: those in `REPLACED` that it has.

    layers: the adapter's layers, in the model already.
    """
    instead: dict[str, Any] = {
        "save_pretrained": AdapterSaver(model),
        "push_to_hub": Refusal(
            "push_to_hub would upload the course's own format: call export_peft(model, folder) and upload that folder."
        ),
        "add_adapter": Refusal(
            "This model carries an adapter of this package, which one of PEFT's would freeze: call unload(model) first; to go on with a PEFT adapter, lora_course.load_peft."
        ),
    }
    instead["load_adapter"] = instead["add_adapter"]
    if output_head(model) in layers.values():
        instead["resize_token_embeddings"] = Refusal(
            "The output head has an adapter, which resizing would drop: resize_token_embeddings first, and inject then."
        )
    for name, method in instead.items():
        if hasattr(model, name):
            setattr(model, name, method)


def restore_methods(model: nn.Module) -> None:
    """The model's own methods again."""
    for name in REPLACED:
        vars(model).pop(name, None)


class Refusal:
    """A method that raises RuntimeError with its sentence, before anything is done."""

    def __init__(self, sentence: str) -> None:
        self.sentence = sentence

    def __call__(self, *_: Any, **__: Any) -> None:
        raise RuntimeError(self.sentence)


class AdapterSaver:
    """`save_pretrained` of an injected model: writes the adapter, where the model's own would write a base full of holes.

    A weak reference to the model, so that a deleted model is freed at once; it goes along with copies and pickles.
    """

    def __init__(self, model: nn.Module) -> None:
        self.reference = weakref.ref(model)

    @property
    def model(self) -> nn.Module:
        found = self.reference()
        assert found is not None, "a model's own attribute goes with it"
        return found

    def __call__(self, save_directory: str | Path, *, push_to_hub: bool = False, **_: Any) -> None:
        """As `save_adapter`. Raises ValueError for `push_to_hub`, RuntimeError where the adapter is merged."""
        from lora_course.checkpoint import save_adapter  # both stand on this module
        from lora_course.injection import adapter_layers

        model = self.model
        if push_to_hub:
            raise ValueError(
                "push_to_hub would upload the course's own format: call export_peft(model, folder) and upload that folder."
            )
        if any(layer.merged for layer in adapter_layers(model).values()):
            raise RuntimeError(
                "The adapter is merged: call unload(model), which keeps the merged weights, and save_pretrained then."
            )
        warnings.warn(
            f"save_pretrained of an injected model writes its adapter alone, as save_adapter does: load_adapter(base, "
            f"{str(save_directory)!r}) reads it. To resume a training use AdapterTrainer; for other tools, export_peft.",
            stacklevel=2,
        )
        save_adapter(model, save_directory)

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterSaver:
        return AdapterSaver(memo.get(id(self.model), self.model))

    def __reduce__(self) -> tuple[type[AdapterSaver], tuple[nn.Module]]:
        return AdapterSaver, (self.model,)
