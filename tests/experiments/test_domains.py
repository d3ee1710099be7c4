"""`lora_course.experiments.domains`: rows of several domains, an adapter for each, routers over them, scores by domain."""

import pytest
import torch

from lora_course.experiments import adapted, bits_by_domain, config_of, domains, rows_of
from lora_course.experiments.arms import Arm, train
from lora_course.experts import latest_gates
from lora_course.states import factor_state

SETTINGS = {
    "model": "nano", "domains": ["bible", "python"], "length": 32, "train_bytes": 20_000, "score_bytes": 800, "batch": 4,
}  # fmt: skip


def rows(domain: str):
    return rows_of(SETTINGS, domain)


@pytest.fixture
def states():
    return domains.one_each(SETTINGS, SETTINGS["domains"], 4, 2e-2, 3, 8, rows)


def test_of_each_domain_the_first_rows_are_read_and_each_says_where_it_is_from() -> None:
    mixed = domains.mixed_rows(SETTINGS, ["python", "bible"], 5, rows)
    assert mixed["domain"][:].tolist() == [0] * 10 + [1] * 10
    for i, domain in enumerate(["python", "bible"]):
        own = mixed["input_ids"][:][mixed["domain"][:] == i]
        assert torch.equal(own, rows(domain)[:10]["input_ids"])


def test_each_adapter_is_trained_on_its_own_domain_alone(states) -> None:
    for domain, other in (("bible", "python"), ("python", "bible")):
        model = adapted(SETTINGS, 3, config_of(4))
        train(Arm(model), rows(domain), 2e-2, 3, 8, 4)
        expected = factor_state(model)
        assert expected.keys() == states[domain].keys()
        assert all(torch.equal(expected[key], states[domain][key]) for key in expected)
        assert any(not torch.equal(expected[key], states[other][key]) for key in expected)


def test_each_domain_is_scored_with_its_own_adapter(states) -> None:
    own = domains.own_bits(SETTINGS, states, "test")
    for domain, other in (("bible", "python"), ("python", "bible")):
        assert own[domain] == bits_by_domain(SETTINGS, states[domain], "test")[domain]
        assert own[domain] < bits_by_domain(SETTINGS, states[other], "test")[domain]


def test_routers_train_over_adapters_that_stay_as_they_are(states) -> None:
    mixed = domains.mixed_rows(SETTINGS, list(states), 6, rows)
    start, end = (
        domains.routed(SETTINGS, list(states.values()), mixed, rate, 3, 6) for rate in (1e-9, 0.5)
    )
    moved = {
        name
        for (name, a), (_, b) in zip(start.named_parameters(), end.named_parameters(), strict=True)
        if (a - b).abs().max() > 1e-6
    }
    assert moved and all("router" in name for name in moved)
    with torch.no_grad():
        end.eval()(input_ids=mixed[:2]["input_ids"])
    (gates,) = latest_gates(end).values()
    assert gates.shape == (2, 32, 2) and (gates - 0.5).abs().max() > 0.01
