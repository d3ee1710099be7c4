"""`progressive.stages`: boundaries, fresh factors, spectra."""

import math

import pytest
import torch

from lora_course import progressive
from lora_course.injection import adapter_layers, inject, merge
from lora_course.progressive import (
    Stage,
    begin_stage,
    inject_stages,
)
from lora_course.states import adapter_state, concatenate, use_adapter
from tests.models import config, qwen, relative
from tests.progressive.models import MODES, STAGES, fill, logits, same, stacked
from tests.tolerances import EXACT, ROUNDED

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("mode", MODES)
def test_the_function_is_unchanged_at_a_boundary_and_the_new_stage_can_learn(mode: str) -> None:
    model = inject_stages(qwen(), STAGES)
    torch.testing.assert_close(logits(model), logits(qwen()), **EXACT)
    for index, stage in enumerate(STAGES):
        if index and mode == "merge":
            merge(model)
        before = logits(model)
        begin_stage(model, stage)
        # fp32: what was one product is now two sums, or a weight rounded once more
        torch.testing.assert_close(logits(model), before, atol=2e-6, rtol=2e-6)
        layers = adapter_layers(model)
        assert all(
            layer.scaling == 2 and (layer.A != 0).all() and not layer.B.any()
            for layer in layers.values()
        )
        assert sum(layer.r for layer in layers.values()) == stage.r * {0: 4, 1: 4, 2: 2}[index]
        fill(model, index)
        assert (
            relative(logits(model), before) > 1e-2
        )  # so that the next boundary has something to keep


def test_all_linear_leaves_the_head_to_a_stage_that_names_it() -> None:
    stages = [Stage(2), Stage(2, ["lm_head"])]
    ranks = [
        {
            name: layer.r
            for name, layer in adapter_layers(
                begin_stage(inject_stages(qwen(), stages), stage)
            ).items()
        }
        for stage in stages
    ]
    assert ranks[0]["lm_head"] == 0 and sum(r == 0 for r in ranks[0].values()) == 1
    assert ranks[1]["lm_head"] == 2 and sum(r > 0 for r in ranks[1].values()) == 1


def test_fresh_factors_come_from_the_seed_and_are_new_parameters() -> None:
    states = []
    for _ in range(2):
        torch.randn(3)  # what was drawn before does not matter
        model = inject_stages(qwen(), STAGES)
        begin_stage(model, STAGES[0], seed=7)
        states.append(adapter_state(model))
        old = [p for p in model.parameters() if p.requires_grad]
    assert same(*states)
    assert not same(
        states[0], adapter_state(begin_stage(inject_stages(qwen(), STAGES), STAGES[0], seed=8))
    )
    begin_stage(model, STAGES[1], seed=8)
    assert not {id(p) for p in old} & {id(p) for p in model.parameters() if p.requires_grad}


def test_a_stage_can_be_left_out_of_the_sum() -> None:
    model = stacked()
    states = progressive.stage_states(model)
    without = inject(qwen(), config(target_modules=sorted(adapter_layers(model))))
    use_adapter(without, concatenate(states))
    torch.testing.assert_close(logits(without), logits(model), **ROUNDED)
    first = inject(qwen(), config(target_modules=["q_proj", "down_proj"]))
    use_adapter(first, states[0])
    torch.testing.assert_close(logits(first), logits(stacked(stages=STAGES[:1])), **ROUNDED)


def test_the_spectrum_is_that_of_the_update_and_two_stages_exceed_the_rank_of_one() -> None:
    model = stacked(stages=[Stage(3, ["q_proj", "up_proj"])] * 2)
    values = progressive.singular_values(model)
    for name, layer in adapter_layers(model).items():
        expected = torch.linalg.svdvals(layer.delta_weight().double())
        assert (
            len(values[name]) == 6 and torch.linalg.matrix_rank(layer.delta_weight()) == 6 > layer.r
        )
        torch.testing.assert_close(values[name], expected[:6], atol=1e-6, rtol=1e-5)
    assert "model.layers.0.mlp.down_proj" not in values
    assert progressive.effective_rank(torch.ones(7)) == pytest.approx(7)
    assert progressive.effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    assert progressive.effective_rank(torch.tensor([0.9, 0.1])) == pytest.approx(
        math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    )
    # wider than the layer: as many values as the weight has
    assert (
        len(
            progressive.singular_values(stacked(stages=[Stage(30, ["k_proj"])] * 2))[
                "model.layers.0.self_attn.k_proj"
            ]
        )
        == 24
    )


@pytest.mark.parametrize(("fields", "message"), [
    ({"r": 0}, "r=0: a stage needs"), ({"r": 2.0}, "r=2.0"), ({"steps": 0}, "steps=0"), ({"learning_rate": 0}, "learning_rate=0"),
    ({"warmup": 101}, "from 0 to 100"), ({"warmup": -1}, "warmup=-1"),
])  # fmt: skip
def test_an_impossible_stage_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage(**{"r": 4} | fields)
