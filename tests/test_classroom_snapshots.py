"""Whatever a function can change in its arguments is seen, and nothing is seen where nothing was changed."""

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from torch import nn

from lora_course.adalora import AdaLoRALinear
from lora_course.classroom.snapshots import changed, snapshot, storages


def things():
    torch.manual_seed(0)
    layer = AdaLoRALinear(nn.Linear(5, 4), r=3, lora_alpha=6)
    layer.E.data.normal_()
    optimizer = torch.optim.AdamW([layer.A, layer.E], lr=0.1)
    layer(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    four_bit = bnb.nn.Linear4bit(64, 4, compute_dtype=torch.float32, quant_type="nf4")
    four_bit.load_state_dict({"weight": torch.randn(4, 64), "bias": torch.zeros(4)})
    return {
        "layer": layer, "optimizer": optimizer, "four_bit": four_bit.to("cpu"), "x": torch.randn(3),
        "nested": {"a": [torch.zeros(2), (1, 2.5)], "b": None}, "array": np.arange(3.0), "nan": torch.tensor(float("nan")),
    }  # fmt: skip


def test_what_is_left_alone_is_the_same() -> None:
    given = things()
    before = snapshot(given, "given")
    given["layer"](torch.randn(2, 5))
    assert changed(before, snapshot(given, "given")) == []


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda t: t["layer"].A.data.add_(1e-6), "layer'].A"),
        (lambda t: t["layer"].base_layer.weight.data.zero_(), "base_layer.weight"),
        (lambda t: t["layer"].mask.logical_not_(), "mask"),
        (lambda t: t["layer"].eval(), "train or eval"),
        (lambda t: t["layer"].base_layer.eval(), "base_layer's train or eval"),
        (lambda t: t["layer"].requires_grad_(True), "base_layer.weight"),
        (lambda t: setattr(t["layer"], "merged", True), "merged"),
        (lambda t: setattr(t["layer"], "scaling", 1.0), "scaling"),
        (lambda t: setattr(t["layer"], "base_layer", nn.Linear(5, 4)), "base_layer's identity"),
        (lambda t: t["layer"](torch.ones(1, 5)).sum().backward(), "layer'].A"),
        (lambda t: t["layer"].half(), "layer'].A"),
        (lambda t: t["optimizer"].state.clear(), "state"),
        (lambda t: t["optimizer"].param_groups[0].update(lr=0.2), "lr"),
        (lambda t: t["optimizer"].param_groups[0]["params"].pop(), "params"),
        (lambda t: t["four_bit"].weight.data.bitwise_not_(), "four_bit'].weight"),
        (lambda t: t["four_bit"].weight.quant_state.absmax.mul_(2), "quant_state"),
        (lambda t: t["x"].mul_(2), "x"),
        (lambda t: t["x"].requires_grad_(), "x"),
        (lambda t: t["x"].unsqueeze_(0), "x"),
        (lambda t: t["nested"]["a"].append(1), "length"),
        (lambda t: t["nested"]["a"][0].add_(1), "'a'][0]"),
        (lambda t: t["nested"].update(c=1), "keys"),
        (lambda t: t["nested"].update(b=t["nested"].pop("a")), "nested"),
        (lambda t: t["array"].sort() or t["array"].put(0, 9), "array"),
        (lambda t: t["nan"].zero_(), "nan"),
    ],
)
def test_what_is_changed_is_named(change, place) -> None:
    given = things()
    before = snapshot(given, "given")
    change(given)
    places = changed(before, snapshot(given, "given"))
    assert places and any(place in found for found in places), places


def test_shared_memory_is_found_through_views_and_layers() -> None:
    x, layer = torch.randn(4, 3), nn.Linear(3, 2)
    memory = storages({"x": x, "layer": layer})
    assert set(storages(x.T[1:])) <= set(memory) and set(storages([layer.bias])) <= set(memory)
    assert not set(storages(x.clone())) & set(memory)


def test_what_stands_in_two_places_may_stand_in_two_copies() -> None:
    pair, loop = (1.0, 2.0), []
    loop.append(loop)
    one, two = (
        {"a": pair, "b": pair, "loop": loop},
        {"a": pair, "b": tuple([1.0, 2.0]), "loop": loop},
    )
    assert not changed(snapshot(one, "given"), snapshot(two, "given"))
