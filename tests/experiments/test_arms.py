"""`lora_course.experiments.arms`: an arm, one training of it, and what it is scored by."""

from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from lora_course.checkpoint import save_adapter
from lora_course.experiments import Arm, Runs, adapted, config_of, train
from lora_course.experiments.arms import (
    base_of,
    base_runs,
    base_score,
    bits_by_domain,
    bits_of,
    components,
    file_bytes,
    in_peft,
    rows_of,
    train_as,
    values_of,
)
from lora_course.experiments.record import Record
from lora_course.injection import adapter_layers, trainable_parameters
from lora_course.states import concatenate, factor_state, relative_error
from tests.models import randomize

SETTINGS = {
    "model": "nano", "domain": "bible", "length": 32, "train_bytes": 20_000, "score_bytes": 500, "seeds": [0, 1], "steps": 3,
}  # fmt: skip


class Counter(TrainerCallback):
    def __init__(self) -> None:
        self.steps = 0

    def on_optimizer_step(self, args, state, control, **_) -> None:
        self.steps += 1


def test_an_arms_own_parts_take_part_in_its_training() -> None:
    rows = rows_of(SETTINGS)
    model, counter, seen = adapted(SETTINGS, 0, config_of(2)), Counter(), []
    before = {name: layer.B.clone() for name, layer in adapter_layers(model).items()}
    arm = Arm(
        model, [counter], lambda model: torch.tensor(100.0),
        finish=lambda model: {"after": len(seen), "steps": counter.steps},
    )  # fmt: skip
    found = train(arm, rows, 1e-2, 0, 3, 2, before_finish=lambda: seen.append("measured"))
    assert len(found.losses) == len(found.curve) == 3 and min(found.losses) > 100
    assert found.seen == {"after": 1, "steps": 3} and found.seconds > 0 and found.model is model
    layers = adapter_layers(model)
    assert all((layers[name].B - before[name]).abs().max() > 0 for name in layers)
    assert arm.parameters(model) == sum(layer.A.numel() + layer.B.numel() for layer in layers.values())  # fmt: skip


def test_a_training_repeats_itself_and_the_seed_draws_factors_and_order() -> None:
    def losses(seed: int) -> list[float]:
        arm = Arm(adapted(SETTINGS, seed, config_of(2)))
        return train(arm, rows_of(SETTINGS), 1e-2, seed, 3, 2).losses

    first = losses(1)
    assert losses(1) == first and losses(2) != first


def test_an_arm_with_its_own_fit_is_trained_by_it() -> None:
    asked = []

    def fit(rows, learning_rate: float, seed: int) -> list[float]:
        asked.append((len(rows), learning_rate, seed))
        return [1.0, 2.0]

    arm = Arm(adapted(SETTINGS, 0, config_of(2)), fit=fit, finish=lambda model: model)
    found = train(arm, rows_of(SETTINGS), 1e-2, 3, 5, 2)
    assert found.losses == [1.0, 2.0] and found.seen == {}
    assert asked == [(len(rows_of(SETTINGS)), 1e-2, 3)]


def test_what_is_scored_is_what_was_trained_on_the_domain_that_was_named(tmp_path: Path) -> None:
    settings = SETTINGS | {"batch": 2, "domains": ["bible", "python"]}
    config = config_of(3, 0.5)  # another rank and scale than those of the model that serves a state
    found = train_as(settings, Arm(adapted(settings, 1, config)), 3e-2, 1, "python")
    assert found.losses == train(
        Arm(adapted(settings, 1, config)), rows_of(settings, "python"), 3e-2, 1, 3, 2
    ).losses  # fmt: skip
    values = values_of(settings, found, "validation")
    assert values == {
        "bits_per_byte": bits_of(settings, found.model, "validation"),
        "parameters": trainable_parameters(found.model),
    }
    assert values_of(settings, found, "test")["losses"] == found.curve
    by_domain = bits_by_domain(settings, found.model, "test")
    assert by_domain == {d: bits_of(settings, found.model, "test", d) for d in ("bible", "python")}
    served = bits_by_domain(settings, factor_state(found.model), "test", ["python"])
    assert served == pytest.approx({"python": by_domain["python"]}, rel=1e-5)
    assert abs(served["python"] - bits_of(settings, base_of(settings), "test", "python")) > 1e-3
    written = save_adapter(found.model, tmp_path) / "adapter.safetensors"
    assert file_bytes(found.arm) == written.stat().st_size


def test_components_of_an_adapter_add_up_to_its_update() -> None:
    state = factor_state(randomize(adapted(SETTINGS, 0, config_of(5, 0.7)), 1))
    parts = [components(state, 0, 2), components(state, 2, 3)]
    module = next(name for name in state if name.endswith(".A")).removesuffix(".A")
    assert [part[f"{module}.A"].shape[0] for part in parts] == [2, 3]
    assert [part[f"{module}.B"].shape[1] for part in parts] == [2, 3]
    assert relative_error(concatenate(parts), state) < 1e-6
    assert relative_error(concatenate(parts[:1]), state) > 0.1
    parts[0][f"{module}.A"].zero_()  # a copy
    assert state[f"{module}.A"].abs().min() > 0


def test_the_base_is_scored_on_both_splits(tmp_path: Path) -> None:
    runs = Runs(Record(tmp_path / "s.json", "s", SETTINGS), progress=str)
    base_runs(runs, SETTINGS)
    assert runs.recorded == {
        f"base/{split}": base_score(SETTINGS, split) for split in ("validation", "test")
    }


def test_pefts_model_holds_each_adapter_under_its_name_and_computes_what_ours_does() -> None:
    ours = {name: randomize(adapted(SETTINGS, 0, config_of(2)), seed) for seed, name in enumerate("ab", 1)}  # fmt: skip
    states = {name: factor_state(model) for name, model in ours.items()}
    theirs = in_peft(SETTINGS, states, config_of(2))
    ids = rows_of(SETTINGS)[:2]["input_ids"]
    logits = {}
    for name, model in ours.items():
        theirs.set_adapter(name)
        with torch.no_grad():
            logits[name] = model.eval()(ids).logits
            torch.testing.assert_close(theirs.eval()(ids).logits, logits[name], atol=1e-4, rtol=1e-4)  # fmt: skip
    assert (logits["a"] - logits["b"]).abs().max() > 0.1  # not twice the same
