"""Of chapter 4.3: an adapter trained on nano as it is and put on nano in NF4, as a server in 4 bits would do.

Training, rows, scoring and seeds are those of the arm "lora" of chapter 1.1's study, at the rate that it found on validation
text; the same search found the same rate for "qlora". Its record holds the two other corners: the adapter trained on NF4, on NF4
and on the base as it is. Here each plain adapter is trained again, scored where it was trained, and scored on NF4.

Expected, before the first run: on NF4 the plain adapter is higher than the one that was trained there, with every seed, and by
less than the rounding costs the untouched base.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_course.experiments import Runs, Study, Witness
from lora_course.experiments import qlora as chapter
from lora_course.experiments.arms import bits_of, config_of
from lora_course.experiments.rates import run_key
from lora_course.injection import inject
from lora_course.states import adapter_state, use_adapter

SETTINGS: dict[str, Any] = chapter.SETTINGS | {"learning_rate": 8e-3}


def on_nf4(trained: nn.Module) -> nn.Module:
    """The adapter of a model, on the base in NF4."""
    config = config_of(chapter.METHODS["lora"]["r"])
    return use_adapter(inject(chapter.base(True), config), adapter_state(trained))


def put(rate: float, seed: int) -> dict[str, float]:
    model = chapter.trained("lora", rate, seed).model
    return {
        "bits_per_byte": bits_of(chapter.SETTINGS, on_nf4(model), "test"),
        "where_trained": bits_of(chapter.SETTINGS, model, "test"),
    }


def body(runs: Runs) -> None:
    rate = SETTINGS["learning_rate"]
    runs.expect(len(runs.seeds))
    for seed in runs.seeds:
        runs(run_key("plain on nf4", rate, seed, "test"), put, rate, seed)


WITNESS = Witness(("plain on nf4/0.008/0/test",), {"bits_per_byte": 0.005, "where_trained": 0.005})
STUDY = Study("4_3_base", SETTINGS, body, WITNESS)
