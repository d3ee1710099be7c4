"""Predicates over raw values: what they may say, and whether a verdict could have been otherwise."""

import pytest

from lora_course.lab.predicates import evaluate, flips, perturbations

VALUES = {"lora": [2.0, 2.2, 2.1], "qlora": [2.05, 2.21, 2.16]}


@pytest.mark.parametrize(
    ("predicate", "holds"),
    [
        ("mean(qlora) < 1.05 * mean(lora)", True),
        ("all(q < p for p, q in zip(lora, qlora))", False),
        ("max(lora) - min(lora) > std(qlora)", True),
        ("sorted(lora)[1] == 2.1 and len(lora) == 3 and 2 < sum(lora) / len(lora) < 3", True),
        ("any(abs(x - 2.2) < 1e-9 for x in qlora)", False),
    ],
)
def test_a_predicate_is_evaluated_over_the_raw_values(predicate, holds) -> None:
    assert evaluate(predicate, VALUES) is holds


@pytest.mark.parametrize(
    ("predicate", "message"),
    [
        ("open('x') is None", "uses open"),
        ("().__class__ == 1", "Attribute"),
        ("(lambda: True)()", "Lambda"),
        ("(y := 1) == 1", "NamedExpr"),
        ("mean(loara) < 1", "uses loara; it knows the values lora, qlora"),
        ("mean(lora)", "came to 2.1"),
        ("lora <", "not a Python expression"),
        ("lora < 3", r"each value is a list.*mean\("),
    ],
)
def test_what_is_no_plain_predicate_is_refused(predicate, message) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(predicate, VALUES)


@pytest.mark.parametrize(
    "predicate",
    [
        "len(lora) == 3",
        "mean(lora) == mean(lora)",
        "min(lora) <= max(lora)",
        "1 < 2",
        "std(lora) >= 0",
    ],
)
def test_a_check_that_cannot_fail_is_found(predicate) -> None:
    assert not flips(predicate, VALUES)


def test_flips_tells_a_check_from_none() -> None:
    assert flips("mean(qlora) < mean(lora)", VALUES)  # false, and could be true
    assert not flips("len(lora) > 0", VALUES)
    # Swapping and zeroing may divide by zero: passed over.
    assert flips("1 / (mean(qlora) - mean(lora)) > 0", VALUES)


def test_every_series_is_perturbed_and_the_given_values_stay() -> None:
    changed = perturbations(VALUES)
    assert all(any(values[name] != VALUES[name] for values in changed) for name in VALUES)
    assert {"lora": VALUES["qlora"], "qlora": VALUES["lora"]} in changed
    assert VALUES == {"lora": [2.0, 2.2, 2.1], "qlora": [2.05, 2.21, 2.16]}
