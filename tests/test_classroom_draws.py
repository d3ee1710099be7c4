"""Inputs are those of their seed, differ where they should, and are no special case by accident."""

import torch

from lora_course.adalora import AdaLoRALinear
from lora_course.classroom.draws import Draw, case


def test_a_seed_draws_the_same_again_and_another_seed_others() -> None:
    def everything(seed):
        draw = Draw(seed)
        return (
            draw.sizes(3, 2, 50),
            draw.integer(0, 10**6),
            draw.normal(3).tolist(),
            draw.number(0, 1),
            draw.order(6).tolist(),
        )

    assert everything(1) == everything(1) != everything(2)


def test_sizes_differ_and_ends_are_included() -> None:
    draw = Draw(0)
    assert all(len(set(draw.sizes(3, 2, 5))) == 3 for _ in range(50))
    assert (
        {draw.integer(1, 2) for _ in range(50)}
        == {1, 2}
        == {n for _ in range(50) for n in draw.sizes(2, 1, 2)}
    )
    assert draw.uniform(99, low=2, high=3).min() >= 2 and draw.uniform(99, low=2, high=3).max() <= 3


def test_a_layer_has_no_zero_factor_and_no_scale_of_one() -> None:
    for seed in range(20):
        layer = Draw(seed).lora(5, 7, 3, use_rslora=bool(seed % 2))
        assert (
            layer.A.all()
            and layer.B.all()
            and layer.base_layer.bias.all()
            and layer.lora_alpha != 3
        )
        assert not layer.base_layer.weight.requires_grad and layer.A.shape == (3, 5)
    assert Draw(0).lora(5, 7, 3, bias=False).base_layer.bias is None
    assert isinstance(Draw(0).lora(5, 7, 3, layer=AdaLoRALinear), AdaLoRALinear)
    state = torch.get_rng_state()
    assert case(1, 2, hint="h", b=3).keywords == {"b": 3} and torch.equal(
        state, torch.get_rng_state()
    )
