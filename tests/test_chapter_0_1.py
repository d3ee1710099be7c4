"""The exercises of chapter 0.1: plausible wrong answers are rejected, each with its own message; right ones pass."""

import copy
import math

import torch
from torch import nn

from lora_course.classroom.chapter_0_1 import check_alpha, check_matching_rank, check_merged_linear
from tests.exercises import (  # noqa: F401
    pytest_generate_tests,
    test_right_answers_pass_and_stubs_are_not_attempted,
    test_wrong_answers_are_rejected_with_messages_of_their_own,
)


def parameters(layers):
    return sum(i + o for i, o in layers)


def in_place(layer):
    layer.merge()
    return layer.base_layer


def built(layer, weight, bias=True):
    linear = nn.Linear(layer.in_features, layer.out_features, bias=bias)
    linear.weight.data = weight.detach()
    if bias:
        linear.bias.data = layer.base_layer.bias.data.clone()
    return linear


def column_by_column(layer):
    """Feed the unit vectors through the layer; its bias is what zeros give."""
    with torch.no_grad():
        bias = layer(torch.zeros(1, layer.in_features))
        linear = built(layer, (layer(torch.eye(layer.in_features)) - bias).T)
    linear.bias.data = bias[0]
    return linear


def by_merging_a_copy(layer):
    return in_place(copy.deepcopy(layer))


def by_trying(everywhere, targets, r):
    budget = r * parameters(everywhere)
    return min(range(1, budget), key=lambda rank: abs(rank * parameters(targets) - budget))


WRONG = {
    check_alpha: [
        lambda new_r, r, a, use_rslora=False: a,
        lambda new_r, r, a, use_rslora=False: a / r,
        lambda new_r, r, a, use_rslora=False: a * r / new_r,
        lambda new_r, r, a, use_rslora=False: 2 * new_r,
        lambda new_r, r, a, use_rslora=False: a * new_r / r,
        lambda new_r, r, a, use_rslora=False: a if use_rslora else a * new_r / r,
        lambda new_r, r, a, use_rslora=False: (
            a * math.sqrt(new_r / r) if use_rslora else a * new_r // r
        ),
    ],
    check_matching_rank: [
        lambda e, t, r: r,
        lambda e, t, r: round(r * sum(i * o for i, o in e) / sum(i * o for i, o in t)),
        lambda e, t, r: round(r * len(e) / len(t)),
        lambda e, t, r: r * parameters(e) / parameters(t),
        lambda e, t, r: r * parameters(e) // parameters(t),
        lambda e, t, r: math.ceil(r * parameters(e) / parameters(t)),
        lambda e, t, r: max(1, math.floor(r * parameters(e) / parameters(t) + 0.2)),
        lambda e, t, r: round(r * parameters(e) / parameters(t)),
    ],
    check_merged_linear: [
        in_place,
        lambda layer: layer.base_layer.weight + layer.delta_weight(),
        lambda layer: layer.base_layer,
        lambda layer: copy.deepcopy(layer.base_layer),
        lambda layer: built(layer, layer.base_layer.weight + layer.B @ layer.A),
        lambda layer: built(layer, layer.base_layer.weight + layer.lora_alpha * layer.B @ layer.A),
        lambda layer: built(layer, layer.delta_weight()),
        lambda layer: built(layer, (layer.base_layer.weight + layer.delta_weight()).T),
        lambda layer: built(layer, layer.base_layer.weight + layer.delta_weight(), bias=False),
    ],
}
RIGHT = {
    check_alpha: [
        lambda new_r, r, a, use_rslora=False: (
            a / r ** (0.5 if use_rslora else 1) * new_r ** (0.5 if use_rslora else 1)
        )
    ],
    check_matching_rank: [
        by_trying,
        lambda e, t, r: max(1, int(r * parameters(e) / parameters(t) + 0.5)),
    ],
    check_merged_linear: [column_by_column, by_merging_a_copy],
}
