"""Teachers that are adapters: they take turns on the student's own base."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_course.distillation.loss import (
    IGNORED,
    DistillationConfig,
    add_teacher,
    counted_logits,
    empty_mixture,
    normalised_weights,
)
from lora_course.folders import read_factors, warn_of_its_base
from lora_course.injection import adapter_layers, disabled
from lora_course.linears import check_not_sharded
from lora_course.lora import AdapterState, LoRALinear
from lora_course.states import split_state

DOMAIN = "domain"
"""The column of a batch that says of which domain each row is: `[B]`, whole numbers."""


class Teachers:
    """Frozen adapters that take turns on the base of `model`, whose own adapter is the student.

    A teacher may have another rank and other target modules than the student: only the base must be the same. Its
    tensors are copied once, kept outside the model (its parameters and checkpoints don't see them), and moved to the
    model's device when they are used.

    Args:
        model: injected and not merged.
        states: by name, each teacher as plain factors: `factor_state` of a model, also of one that `load_adapter` or
            `load_peft` read from a folder, or the folder itself (`folders.read_factors`).
        weights: of the teachers in the order of `states`, `[K]`, or by domain, `[D, K]`: row d for the rows of a batch
            whose `domain` is d. Relative to each other, equal by default. A teacher whose weight is 0 does not run.

    Attributes:
        names: of the teachers.    layers: of each teacher, by module name.    weights: `[K]` or `[D, K]`, summing to 1.

    Raises:
        ValueError: no teacher, one that is not for this base, weights that don't fit.
    """

    def __init__(
        self,
        model: nn.Module,
        states: Mapping[str, AdapterState | str | Path],
        weights: Tensor | Sequence[float] | Sequence[Sequence[float]] | None = None,
    ) -> None:
        if (
            not isinstance(states, Mapping)
            or not states
            or any(torch.is_tensor(state) for state in states.values())
            or not all(isinstance(name, str) for name in states)
        ):
            raise ValueError(
                "Teachers are given by name: {'law': factor_state(model), 'code': …}, one or more."
            )
        check_not_sharded(model, "teachers that take turns on its layers")
        self.model, self.names = model, list(states)
        self.weights = normalised_weights([1.0] * len(states) if weights is None else weights)
        if self.weights.ndim > 2 or self.weights.shape[-1] != len(states):
            raise ValueError(
                f"weights are {list(self.weights.shape)} for {len(states)} teachers {self.names}: [K] or [domains, K] is expected."
            )
        factors = {name: read_factors(state) for name, state in states.items()}
        self.layers = [self._build(name, state) for name, state in factors.items()]
        for adapter, layers in zip(states.values(), self.layers, strict=True):
            warn_of_its_base(model, adapter, layers)

    def fingerprint(self) -> str:
        """A hash of the weights and of every teacher's factors, scales and modules."""
        digest = hashlib.sha256(repr(self.weights.tolist()).encode())
        for name, layers in zip(self.names, self.layers, strict=True):
            digest.update(name.encode())
            for module, layer in layers.items():
                A, B, scaling = layer.factors()
                digest.update(f"{module} {scaling!r}".encode())
                for factor in (A, B):
                    digest.update(factor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.names)

    @contextmanager
    def switched(self, teacher: int | str) -> Iterator[nn.Module]:
        """Within the block the model is this teacher, in eval mode and without gradients.

        Afterwards, and after an error, it is the student: the same layers and parameters, each module in its own mode.
        Turns are not taken inside one another. Raises RuntimeError if the model is merged.
        """
        layers = self.layers[self.names.index(teacher) if isinstance(teacher, str) else teacher]
        modes = [(module, module.training) for module in self.model.modules()]
        for layer in layers.values():
            device = layer.base_layer.weight.device
            if (
                layer.A.device != device and device.type != "meta"
            ):  # meta: the base layer is offloaded
                layer.to(device)
        # disabled: a student's hooks on the model, such as a router's, have nothing to do for a teacher
        with disabled(self.model), standing_in(self.model, layers), torch.no_grad():
            self.model.eval()
            try:
                yield self.model
            finally:
                for module, training in modes:
                    module.training = training

    def log_probs(self, inputs: Mapping[str, Any], config: DistillationConfig) -> Tensor:
        """log p̄ `[N, V]` of the N tokens of a batch whose label counts, in the batch's order.

        Each teacher sees only the rows in which it has a weight: with one teacher a domain, K teachers cost what one
        does. One teacher's logits exist at a time.
        inputs: what the model takes, with `labels` `[B, T]`, and `domain` `[B]` if the weights are by domain.
        """
        inputs, labels, domain = split_batch(inputs)
        weights = self._weights_of(len(labels), domain)
        row_of_token = (labels[:, 1:] != IGNORED).nonzero()[:, 0].cpu()
        total: Tensor | None = None
        for k in range(len(self)):
            rows = weights[:, k] > 0
            if not rows.any():
                continue
            part = {key: choose_rows(value, rows) for key, value in inputs.items()}
            with self.switched(k) as model:
                logits = counted_logits(
                    model(**part, use_cache=False).logits, choose_rows(labels, rows)
                )
                total = (
                    empty_mixture(logits, (len(row_of_token), logits.shape[-1]), config)
                    if total is None
                    else total
                )
                tokens = rows[row_of_token]
                where = slice(None) if tokens.all() else tokens.to(total.device)
                add_teacher(total, where, logits, weights[row_of_token[tokens], k, None], config)
        assert total is not None  # a row's weights sum to 1, so some teacher ran
        return F.log_softmax(total, -1)

    def _weights_of(self, rows: int, domain: Tensor | None) -> Tensor:
        """`[B, K]` on the CPU."""
        if self.weights.ndim == 1:
            return self.weights.expand(rows, -1)
        if domain is None:
            raise ValueError(
                f"The weights are by domain, {list(self.weights.shape)}, but the batch has no column {DOMAIN!r}: add it to the dataset."
            )
        domain = domain.cpu()
        if (
            domain.is_floating_point()
            or domain.shape != (rows,)
            or not 0 <= int(domain.min()) <= int(domain.max()) < len(self.weights)
        ):
            raise ValueError(
                f"{DOMAIN}={domain.tolist()}: one number in 0…{len(self.weights) - 1} for each of {rows} rows is expected."
            )
        return self.weights[domain]

    def _build(self, teacher: str, state: AdapterState) -> dict[str, LoRALinear]:
        student, modules, layers = adapter_layers(self.model), dict(self.model.named_modules()), {}
        for name, tensors in split_state(state).items():
            if name not in modules:
                raise ValueError(
                    f"The teacher {teacher!r} adapts {name!r}, which the model does not have: it was made for another base model."
                )
            layer = LoRALinear(
                student[name].base_layer if name in student else modules[name], r=1, lora_alpha=1
            )
            layer.check_tensors(name, tensors)
            layer.load_tensors(tensors)
            layers[name] = layer.requires_grad_(False)
        return layers


@contextmanager
def standing_in(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the block `layers` are in the model, and of the student's layers only their bases."""
    layers_here = adapter_layers(model)
    if changed := [name for name, layer in layers_here.items() if layer.merged or layer.folded]:
        raise RuntimeError(
            f"The base of {changed[0]!r} holds a part of the student's adapter, which would be in every teacher too: call merge(model) and unmerge(model) first."
        )
    bases = {name: layer.base_layer for name, layer in layers_here.items()}
    before = {name: model.get_submodule(name) for name in [*bases, *layers]}
    try:
        for name in before:
            model.set_submodule(name, layers[name] if name in layers else bases[name])
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def split_batch(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """What the model takes, the labels, the domains."""
    if "labels" not in inputs:
        raise ValueError(
            f"The batch holds {sorted(inputs)}: 'labels' is expected too, −100 where a token does not count."
        )
    if not len(inputs["labels"]):
        raise ValueError("The batch has no rows: leave empty batches out.")
    if "input_ids" in inputs and inputs["labels"].shape != inputs["input_ids"].shape:
        raise ValueError(
            f"labels are {list(inputs['labels'].shape)} and input_ids {list(inputs['input_ids'].shape)}: a label for each token is "
            "expected, −100 where it does not count."
        )
    rest = {key: value for key, value in inputs.items() if key not in ("labels", DOMAIN)}
    return rest, inputs["labels"], inputs.get(DOMAIN)


def choose_rows(value: Any, rows: Tensor) -> Any:
    """What a batch holds for the chosen rows alone, if it holds something for each."""
    return (
        value[rows.to(value.device)]
        if torch.is_tensor(value) and value.shape[:1] == rows.shape
        else value
    )
