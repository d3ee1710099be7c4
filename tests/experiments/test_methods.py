"""`methods` and `peft_methods`: what starts as the base, has about LoRA's size, learns, and differs as it says."""

import functools
import math
from typing import Any

import pytest
import torch

from lora_course.experiments import base_of, comparison, methods, neighbours, peft_methods
from lora_course.experiments.arms import train
from lora_course.experiments.neighbours import NEIGHBOURS, SETTINGS

SMALL = SETTINGS | {"steps": 6, "batch": 2, "length": 32, "train_bytes": 60_000}
IDS = torch.arange(5, 45).reshape(2, 20)
SLOW = {"eva": pytest.mark.slow}  # its start is a decomposition of each layer's inputs


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the records are; in bf16 a model that starts as the base is it up to rounding alone."""
    monkeypatch.setenv("LORA_COURSE_CPU_DTYPE", "float32")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def trained(make: Any, rate: float = 4e-3, settings: Any = SMALL) -> Any:
    arm = make(settings, 3)
    rows = comparison.ordered_rows("python", 3, settings)
    how: dict[str, Any] = {"train_sampling_strategy": "sequential"}
    return train(arm, rows, rate, 3, settings["steps"], settings["batch"], **how)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW.get(name, ())) for name in NEIGHBOURS]
)
def test_a_neighbour_starts_as_the_base_learns_and_has_loras_size_where_its_form_allows(
    name: str,
) -> None:
    # decompositions in fp32 and their sum again: 1e-4 of logits of the order of ten
    before = logits(base_of(SMALL))
    if name != "eva":  # which is begun with the rows
        torch.testing.assert_close(
            logits(NEIGHBOURS[name].make(SMALL, 3).model), before, atol=1e-3, rtol=0
        )
    untouched = trained(NEIGHBOURS[name].make, rate=1e-12)
    torch.testing.assert_close(logits(untouched.model), before, atol=1e-3, rtol=0)
    found = trained(NEIGHBOURS[name].make)
    assert len(found.losses) == 6 and all(math.isfinite(loss) for loss in found.losses)
    assert (logits(found.model) - before).abs().max() > 0.01
    # one seed, one start: a record's runs come out again, from the first loss on
    if name != "eva":  # whose start takes long
        assert trained(NEIGHBOURS[name].make).losses == pytest.approx(found.losses, abs=1e-4)
    lora = methods.lora(SMALL, 0)
    share = found.arm.parameters(found.model) / lora.parameters(lora.model)
    expected = {"vera": 0.113, "beft": 0.065}.get(name)
    assert share == pytest.approx(expected or 1, abs=0.001 if expected else 0.1)


def test_lora_fa_trains_b_and_lora_plus_gives_it_the_larger_rate() -> None:
    def factors(make: Any, settings: Any = SMALL) -> dict[str, torch.Tensor]:
        named = dict(trained(make, settings=settings).model.named_parameters())
        return {name: p.detach() for name, p in named.items() if "lora_" in name}

    plain = factors(peft_methods.from_loras_start)
    frozen = factors(peft_methods.lora_fa)
    drawn = methods.lora(SMALL, 3).model.model.layers[0].self_attn.q_proj.A
    (a,) = (name for name in plain if "layers.0.self_attn.q_proj.lora_A" in name)
    assert torch.equal(frozen[a], drawn) and not torch.equal(plain[a], drawn)
    b = a.replace("lora_A", "lora_B")
    assert frozen[b].abs().max() > 0
    # at one rate for both LoRA+ is LoRA; at sixteen times B's, B moves further
    same = factors(peft_methods.lora_plus, SMALL | {"loraplus_lr_ratio": 1})
    torch.testing.assert_close(same[b], plain[b], atol=1e-4, rtol=1e-2)
    assert factors(peft_methods.lora_plus)[b].abs().max() > 5 * plain[b].abs().max()


def test_the_rank_moves_what_has_another_form() -> None:
    def size(name: str, r: int) -> int:
        arm = NEIGHBOURS[name].make(SMALL | {"r": r}, 0)
        return arm.parameters(arm.model)

    for name in ("oft", "loha", "pissa"):
        assert size(name, 16) / size(name, 8) == pytest.approx(2, abs=0.05)


def test_gates_close_as_fast_at_every_rate_and_length() -> None:
    # six steps at 0.02 under the penalty p take p * 0.02 * 6 / 2 off a gate
    rate, penalty = 0.02, 2.5
    settings = SMALL | {"gate_threshold": penalty * rate * SMALL["steps"] / 2}
    by_threshold = trained(methods.gates, rate, settings)
    by_penalty = trained(functools.partial(methods.gates, penalty=penalty), rate)
    assert by_threshold.losses == by_penalty.losses
    assert by_threshold.seen == by_penalty.seen and by_threshold.seen["ranks"]["least"] < 12
    other = trained(methods.gates, rate, SMALL | {"gate_threshold": 0.9})
    assert other.arm.parameters(other.model) < by_penalty.arm.parameters(by_penalty.model)


def test_a_claim_stated_before_its_runs_can_fail() -> None:
    from lora_course.experiments import longer
    from lora_course.lab.predicates import evaluate

    for stated in (neighbours.CLAIMS | longer.CLAIMS).values():
        names = {n for n in NEIGHBOURS | longer.METHODS if n in stated.rule} | {"best", "forgets", "loses", "ahead", "apart"}  # fmt: skip
        names |= {f"{name}_{steps}" for name in longer.METHODS for steps in (32, 320)}
        verdicts = {
            evaluate(stated.rule, {n: [s * v for v in (1.0, 1.1, 0.9, 1.0, 1.0)] for n in names})
            if "_320" not in stated.rule
            else evaluate(stated.rule, {n: [s if "_320" in n else 0.0] for n in names})
            for s in (1.0, -1.0, 0.001)
        }
        assert verdicts == {True, False}, stated.statement
