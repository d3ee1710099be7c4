"""Distillation: several LoRA teachers on one shared base, one LoRA student on the same base.

    L = (1 − α) · CE(y, softmax(z)) + α · T² · KL(p̄ ‖ q),     p̄ = Σₖ wₖ softmax(zₖ / T),     q = softmax(z / T)

a mean over the tokens that have a label; z `[B, T, V]` are the student's logits, zₖ the k-th teacher's, wₖ ≥ 0, Σₖ wₖ = 1.
The gradient with respect to z is α · T · (q − p̄) of a token, and q − p̄ shrinks as 1/T: the factor T² keeps the term's size.

Sources: Hinton et al., arXiv 1503.02531; reverse KL, MiniLLM, arXiv 2306.08543 (there over text that the student writes,
here over given text); a LoRA student, KD-LoRA, arXiv 2410.20777.

Teachers are adapters, so N of them cost one base and N adapters. `Teachers` exchanges whole layers for the time of a
teacher's forward pass: the student's own layers are set aside, and come back as the same objects with the same bits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainingArguments

from lora_course.injection import adapter_layers, disabled
from lora_course.lora import AdapterState, LoRALinear
from lora_course.states import split_state
from lora_course.training import AdapterTrainer

IGNORED = -100
"""The label of a token that does not count."""
DOMAIN = "domain"
"""The column of a batch that says of which domain each row is: `[B]`, whole numbers."""


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """What is minimised.

    Attributes:
        alpha: α, the share of the teachers, in [0, 1]; 1 needs labels only to tell which tokens count.
        temperature: T > 0, of teachers and student alike; the task loss is at temperature 1.
        mixture: "probabilities" (p̄ above) or "logits" (softmax of Σ wₖ zₖ / T, the normalised geometric mean of the
            teachers, in which what one of them rules out is out; here to be compared with).
        divergence: "forward", KL(p̄ ‖ q), or "reverse", KL(q ‖ p̄).
        temperature_squared: multiply the divergence by T². Off, the teachers' share fades as T grows.

    Raises:
        ValueError: a value outside its range.
    """

    alpha: float = 0.5
    temperature: float = 1.0
    mixture: str = "probabilities"
    divergence: str = "forward"
    temperature_squared: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha!r}: the teachers' share is a number in [0, 1].")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature!r}: a positive number is expected; 1 leaves the distributions as they are."
            )
        for field, known in (
            ("mixture", ("probabilities", "logits")),
            ("divergence", ("forward", "reverse")),
        ):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"{field}={getattr(self, field)!r}: {known[0]!r} or {known[1]!r} is expected."
                )


class DistillationLoss(NamedTuple):
    """Means over the tokens that count, in nats; 0-dimensional tensors.

    total: L, to call `backward` on. divergence: without α and T². task: the cross-entropy.
    """

    total: Tensor
    divergence: Tensor
    task: Tensor


# -------------------------------------------------------------------------------------------------------- the loss


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    labels: Tensor,
    config: DistillationConfig = DistillationConfig(),
    weights: Tensor | Sequence[float] | None = None,
) -> DistillationLoss:
    """L of a batch of a causal language model: the logits at position t are for the label at t + 1.

    Args:
        student_logits: `[B, T, V]`, with gradient.
        teacher_logits: `[B, T, V]` each. They get no gradient.
        labels: `[B, T]`, not shifted; a position whose label is −100 counts nowhere.
        weights: of the teachers, `[K]`; relative to each other, equal by default.

    Raises:
        ValueError: logits or labels of other shapes, weights that don't fit, no teacher.
    """
    if labels.shape != student_logits.shape[:2]:
        raise ValueError(
            f"labels are {list(labels.shape)}, the student's logits {list(student_logits.shape)}: [B, T] and [B, T, V] are expected."
        )
    for k, logits in enumerate(teacher_logits):
        if logits.shape != student_logits.shape:
            raise ValueError(
                f"Teacher {k}'s logits are {list(logits.shape)}, the student's {list(student_logits.shape)}: distillation "
                "compares them token by token, so both need the same text and the same vocabulary."
            )
    target = mixture_log_probs(
        [_counted(logits, labels) for logits in teacher_logits], weights, config
    )
    return _loss(student_logits, target, labels, config)


@torch.no_grad()
def mixture_log_probs(
    teacher_logits: Sequence[Tensor],
    weights: Tensor | Sequence[float] | None = None,
    config: DistillationConfig = DistillationConfig(),
) -> Tensor:
    """log p̄ `[…, V]` of teachers' finite logits `[…, V]` at the config's temperature, in fp32 (float64 stays).

    Added up in logarithms: log p̄ stays finite where every probability underflows.
    weights: `[K]`, relative, equal by default. Raises ValueError for weights that don't fit, or no teacher.
    """
    weights = _normalised([1.0] * len(teacher_logits) if weights is None else weights)
    if weights.shape != (len(teacher_logits),):
        raise ValueError(
            f"{len(teacher_logits)} teachers and weights {list(weights.shape)}: one weight for each teacher is expected."
        )
    total = None
    for logits, weight in zip(teacher_logits, weights, strict=True):
        total = _start(logits, logits.shape, config) if total is None else total
        _add(total, slice(None), logits, weight, config)
    return F.log_softmax(total, -1)


def _start(logits: Tensor, shape: Sequence[int], config: DistillationConfig) -> Tensor:
    """An empty mixture: Σ w z / T, or log Σ w p, over no teacher."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.full(
        tuple(shape),
        0.0 if config.mixture == "logits" else -math.inf,
        dtype=dtype,
        device=logits.device,
    )


def _add(
    total: Tensor, where: Tensor | slice, logits: Tensor, weight: Tensor, config: DistillationConfig
) -> None:
    """Add one teacher to the rows `where` of `total`, in place; `weight` broadcasts with `logits`."""
    scaled, weight = logits.to(total.dtype) / config.temperature, weight.to(total)
    if config.mixture == "logits":
        total[where] += weight * scaled
    else:
        total[where] = torch.logaddexp(total[where], weight.log() + F.log_softmax(scaled, -1))


def _loss(
    student_logits: Tensor,
    target: Tensor,
    labels: Tensor,
    config: DistillationConfig,
    num_items: Tensor | int | None = None,
) -> DistillationLoss:
    """The loss from log p̄ `[N, V]` of the N tokens that count; its sums are divided by N, or by `num_items`."""
    logits = _counted(student_logits, labels).to(target.dtype)
    student, target_first = (
        F.log_softmax(logits / config.temperature, -1),
        config.divergence == "forward",
    )
    first, second = (target, student) if target_first else (student, target)
    divisor = max(1, len(target)) if num_items is None else num_items
    divergence = (first.exp() * (first - second)).sum() / divisor
    next_tokens = labels[:, 1:][labels[:, 1:] != IGNORED].to(logits.device)
    task = F.cross_entropy(logits, next_tokens, reduction="sum") / divisor
    scale = config.temperature**2 if config.temperature_squared else 1.0
    total = (1 - config.alpha) * task + config.alpha * scale * divergence
    return DistillationLoss(total, divergence.detach(), task.detach())


def _counted(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits `[N, V]` whose next token has a label, row after row."""
    return logits[:, :-1][(labels[:, 1:] != IGNORED).to(logits.device)]


def _normalised(weights: Tensor | Sequence[float]) -> Tensor:
    """`[K]` or `[D, K]` on the CPU, summing to 1 over the teachers."""
    weights = torch.as_tensor(weights).detach().to("cpu", torch.float64)
    proper = weights.numel() > 0 and torch.isfinite(weights).all() and (weights >= 0).all()
    if not proper or (weights.sum(-1) == 0).any():
        raise ValueError(
            f"weights={weights.tolist()}: numbers of 0 or more are expected, one for each teacher, of which not all are 0."
        )
    return weights / weights.sum(-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------- the teachers


class Teachers:
    """Frozen adapters that take turns on the base of `model`, whose own adapter is the student.

    A teacher may have another rank and other target modules than the student: only the base must be the same. Its
    tensors are copied once, kept outside the model (its parameters and checkpoints don't see them), and moved to the
    model's device when they are used.

    Args:
        model: injected and not merged.
        states: by name, each teacher as plain factors: `factor_state` of a model, also of one that `load_adapter` or
            `load_peft` read from a folder.
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
        states: Mapping[str, AdapterState],
        weights: Tensor | Sequence[float] | Sequence[Sequence[float]] | None = None,
    ) -> None:
        if (
            not isinstance(states, Mapping)
            or not states
            or any(torch.is_tensor(state) for state in states.values())
        ):
            raise ValueError(
                "Teachers are given by name: {'law': factor_state(model), 'code': …}, one or more."
            )
        self.model, self.names = model, list(states)
        self.weights = _normalised([1.0] * len(states) if weights is None else weights)
        if self.weights.ndim > 2 or self.weights.shape[-1] != len(states):
            raise ValueError(
                f"weights are {list(self.weights.shape)} for {len(states)} teachers {self.names}: [K] or [domains, K] is expected."
            )
        self.layers = [self._build(name, state) for name, state in states.items()]

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
        with disabled(self.model), _standing_in(self.model, layers), torch.no_grad():
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
        inputs, labels, domain = _split(inputs)
        weights = self._weights_of(len(labels), domain)
        row_of_token = (labels[:, 1:] != IGNORED).nonzero()[:, 0].cpu()
        total = None
        for k in range(len(self)):
            rows = weights[:, k] > 0
            if not rows.any():
                continue
            part = {key: _rows(value, rows) for key, value in inputs.items()}
            with self.switched(k) as model:
                logits = _counted(model(**part, use_cache=False).logits, _rows(labels, rows))
                total = (
                    _start(logits, (len(row_of_token), logits.shape[-1]), config)
                    if total is None
                    else total
                )
                tokens = rows[row_of_token]
                where = slice(None) if tokens.all() else tokens.to(total.device)
                _add(total, where, logits, weights[row_of_token[tokens], k, None], config)
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
        if domain.shape != (rows,) or not 0 <= int(domain.min()) <= int(domain.max()) < len(
            self.weights
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
def _standing_in(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the block `layers` are in the model, and of the student's layers only their bases."""
    bases = {name: layer.base_layer for name, layer in adapter_layers(model).items()}
    before = {name: model.get_submodule(name) for name in bases | layers}
    try:
        for name in before:
            model.set_submodule(name, layers[name] if name in layers else bases[name])
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def _split(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor, Tensor | None]:
    """What the model takes, the labels, the domains."""
    if "labels" not in inputs:
        raise ValueError(
            f"The batch holds {sorted(inputs)}: 'labels' is expected too, −100 where a token does not count."
        )
    rest = {key: value for key, value in inputs.items() if key not in ("labels", DOMAIN)}
    return rest, inputs["labels"], inputs.get(DOMAIN)


def _rows(value: Any, rows: Tensor) -> Any:
    """What a batch holds for the chosen rows alone, if it holds something for each."""
    return (
        value[rows.to(value.device)]
        if torch.is_tensor(value) and value.shape[:1] == rows.shape
        else value
    )


# ------------------------------------------------------------------------------------------------- loop and Trainer


def distillation_step(
    teachers: Teachers, inputs: Mapping[str, Any], config: DistillationConfig = DistillationConfig()
) -> DistillationLoss:
    """L of one batch: the teachers first, when no activation of the student is held, then the student with gradients.

    inputs: as for `Teachers.log_probs`. The student's mode is left as it is.
    """
    target = teachers.log_probs(inputs, config)
    inputs, labels, _ = _split(inputs)
    return _loss(teachers.model(**inputs, use_cache=False).logits, target, labels, config)


def distill(
    teachers: Teachers,
    batches: Iterable[Mapping[str, Any]],
    optimizer: torch.optim.Optimizer,
    config: DistillationConfig = DistillationConfig(),
) -> list[dict[str, float]]:
    """The plain loop: a step of `optimizer` a batch, the student in training mode. Returns each step's three means."""
    teachers.model.train()
    history = []
    for inputs in batches:
        loss = distillation_step(teachers, inputs, config)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        history.append({name: value.item() for name, value in loss._asdict().items()})
    return history


class DistillationTrainer(AdapterTrainer):
    """`AdapterTrainer` whose loss is L: a mean over the tokens of the whole optimiser step, however it is cut into
    micro-batches, plus `auxiliary_loss`, if there is one.

    `evaluate` gives L as `eval_loss`. Checkpoints hold the student alone: to resume, give the same teachers again.

    Args:
        teachers: on `model`. With weights by domain the datasets need a column `domain`.
        config: what to minimise.
        model, args, train_dataset, …: as for `AdapterTrainer`.

    Raises:
        ValueError: teachers of another model, an argument that sets another loss.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        teachers: Teachers,
        config: DistillationConfig = DistillationConfig(),
        **arguments: Any,
    ) -> None:
        if teachers.model is not model:
            raise ValueError(
                "The teachers were made for another model: call Teachers(model, states) with the model that is trained."
            )
        if (
            arguments.get("compute_loss_func")
            or args.label_smoothing_factor
            or args.use_liger_kernel
        ):
            raise ValueError(
                "compute_loss_func, label_smoothing_factor and use_liger_kernel set another loss than the distillation's: leave them out."
            )
        super().__init__(model, args, compute_loss_func=self._student_loss, **arguments)
        self.teachers, self.distillation = teachers, config
        self._target: Tensor | None = None
        self._sums = torch.zeros(3)  # of divergence, of task loss, of tokens, since the last log

    @property
    def history(self) -> list[dict[str, float]]:
        """`step`, `loss` (auxiliary part included), `divergence` and `task` at each logged step; whole after resuming."""
        keys = ("step", "loss", "divergence", "task")
        return [
            {key: entry[key] for key in keys} for entry in self.state.log_history if "loss" in entry
        ]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """L of a micro-batch: its sums divided by the tokens of the whole step."""
        self._target = self.teachers.log_probs(inputs, self.distillation)
        inputs = {key: value for key, value in inputs.items() if key != DOMAIN}
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._target = None

    def _student_loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        loss = _loss(outputs.logits, self._target, labels, self.distillation, num_items_in_batch)
        if self.model.training:
            tokens = len(self._target)
            items = tokens if num_items_in_batch is None else num_items_in_batch
            parts = [loss.divergence * items, loss.task * items, loss.task.new_tensor(tokens)]
            self._sums = self._sums.to(loss.task.device) + torch.stack(parts)
        return loss.total

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        """As `Trainer.log`, with the divergence and the task loss a token since the last time."""
        if "loss" in logs:
            divergence, task, tokens = self._sums.tolist()
            self._sums = torch.zeros(3)
            logs = logs | {"divergence": divergence / max(1, tokens), "task": task / max(1, tokens)}
        super().log(logs, *arguments, **named)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.teachers.weights.ndim == 2 and DOMAIN not in self._signature_columns:
            self._signature_columns.append(DOMAIN)
