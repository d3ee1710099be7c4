"""Of the study of chapter 3.2: the teachers as one model, and what each way to serve four domains costs."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lora_course import distillation, experts, lab
from lora_course.distillation import DistillationConfig, Teachers
from lora_course.experiments import adapted, base_of, config_of
from lora_course.experiments import distillation_models as made
from lora_course.experiments.distillation_models import DOMAINS, SETTINGS, R, teacher_states
from lora_course.experiments.timing import race
from lora_course.injection import merge, unload
from lora_course.states import adapter_state, use_adapter


class Ensemble(nn.Module):
    """The teachers' mixture as one model: a forward pass of each for every answer."""

    def __init__(self, teachers: Teachers, mixture: str) -> None:
        super().__init__()
        self.model, self.config = teachers.model, teachers.model.config
        self.each, self.settings = teachers, DistillationConfig(mixture=mixture)

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()  # type: ignore[operator]  # a method of transformers' models

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        each = []
        for name in self.each.names:
            with self.each.switched(name) as model:
                each.append(model(input_ids=input_ids, use_cache=False).logits)
        return SimpleNamespace(logits=distillation.mixture_log_probs(each, None, self.settings))


def student(seed: int) -> nn.Module:
    return adapted(SETTINGS, seed, config_of(R))


def ensemble(seed: int, mixture: str) -> Ensemble:
    return Ensemble(Teachers(student(seed), teacher_states(seed)), mixture)


@torch.no_grad()
def latency(seed: int) -> dict[str, Any]:
    """Milliseconds of a forward pass of each way to serve four domains, median of repeats that take turns."""
    how = SETTINGS["latency"]
    ids = made.mixed_rows()["input_ids"][: how["batch"]][:, : how["length"]]
    plain, inside = (use_adapter(student(seed), made.merged(1.0, seed)) for _ in range(2))
    mixed = base_of(SETTINGS)
    experts.mix_experts(mixed, list(teacher_states(seed).values()))
    models = {
        "base": base_of(SETTINGS),
        "student": plain,
        "student, merged into the base": unload(merge(inside)),
        "mixture of experts": mixed,
        "all four teachers": ensemble(seed, "probabilities"),
    }
    forward = {"input_ids": ids, "use_cache": False}
    arms = {name: functools.partial(model.eval(), **forward) for name, model in models.items()}
    seconds = race(arms, how["repeats"], time.perf_counter)
    medians = {name: round(1000 * statistics.median(seconds[name]), 2) for name in arms}
    return {"milliseconds": medians, "threads": torch.get_num_threads()}


def step_of(teachers: Teachers, plain: dict[str, Tensor]) -> None:
    distillation.distillation_step(teachers, plain).loss.backward()


def memory(seed: int) -> dict[str, Any]:
    """Bytes: of the base, of one teacher as an adapter, of the student; and what a training step allocates at its peak."""
    states, model = teacher_states(seed), student(seed).train()
    batch = made.mixed_rows()[: SETTINGS["batch"]]
    plain = {key: value for key, value in batch.items() if key != "domain"}
    steps: dict[str, Callable[[], Any]] = {
        "data alone": lambda: model(**plain, use_cache=False).loss.backward()
    }
    for count in range(1, len(states) + 1):
        teachers = Teachers(model, dict(list(states.items())[:count]))
        steps[f"{count} teachers"] = functools.partial(step_of, teachers, plain)
    peaks = {}
    for name, step in steps.items():
        step()  # gradients exist from here on
        peaks[name] = lab.peak_memory(step)[1]
    return {
        "base_bytes": lab.tensor_bytes(base_of(SETTINGS)),
        "teacher_bytes": sum(t.nbytes for t in states[DOMAINS[0]].values()),
        "student_bytes": sum(tensor.nbytes for tensor in adapter_state(model).values()),
        "step_peak_bytes": peaks,
    }
