"""Equal by value in whatever form, and never by accident."""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from lora_course.classroom.comparison import difference

X = torch.tensor([[1.0, -2.0], [0.5, 300.0]])


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (X.numpy()[::-1][::-1], X), (X.flip(0).numpy()[::-1], X), (list(X.flip(1).numpy()[:, ::-1]), X), (X.numpy().astype(">f4"), X),
        (X.numpy().astype(np.longdouble), X), (np.array(list(X) + [None], dtype=object)[:-1], X),
        (X.numpy(), X), (X.tolist(), X), (X.double(), X), (X.bfloat16(), X), (list(X), X), (X.clone().requires_grad_(), X),
        (X + 1e-6, X), (np.float32(0.5), 0.5), (torch.tensor(0.5), 0.5), (torch.tensor([[3]]), 3), (np.int64(3), 3), (3.0, 3),
        (Decimal("0.5"), 0.5), (Fraction(1, 2), 0.5), ([1, 2], (1, 2)), ((i for i in (1, 2)), [1, 2]), (np.array([1, 2]), [1, 2]), ({"b": 2, "a": 1}, {"a": 1, "b": 2}),
        (np.bool_(True), True), (torch.tensor(False), False), ([True, False], torch.tensor([True, False])),
        (torch.tensor([1, 2], dtype=torch.int32), torch.tensor([1, 2])), ([], torch.zeros(0)), (("a", "b"), {"b", "a"}),
        (torch.tensor([float("inf"), 1.0]), torch.tensor([float("inf"), 1.0])), ([], []),
    ],
)  # fmt: skip
def test_equal(found, expected) -> None:
    assert difference(found, expected) is None


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (X.T, X), (X * float("nan"), X), (X + 1, X), (X * 1.001, X), (X[None], X), ("a", X), (None, X), (X.abs(), X),
        (torch.full((2,), 1e-9), torch.zeros(2)), (X.clone().index_fill(0, torch.tensor(0), float("nan")), X), (X + 0j, X),
        (float("nan"), 0.5), (0.501, 0.5), ("0.5", 0.5), (None, 0.5), (torch.ones(2), 1), (True, 1), (4, 3), (1 + 0j, 1.0),
        (10**400, 3), (Decimal("sNaN"), 0.5), (torch.ones(1, device="meta"), 1.0), (torch.ones(2, device="meta"), torch.ones(2)),
        (torch.ones([1] * 40), X), ({"a" * 10**6: 1}, {"a": 1}), ([1], (1, 2)), ("ab", ["a", "b"]), ({"a": 1}, {"a": 1, "b": 2}), ({"a": 1, "b": 3}, {"a": 1, "b": 2}), ([1, 2], {"a": 1}),
        (1, True), (None, False), (torch.ones(2), torch.ones(2, dtype=torch.bool)), (torch.tensor([True]), torch.tensor([1.0])),
        (["a", "a"], {"a"}), (["a", "c"], {"a", "b"}), (torch.tensor([1.5]), torch.tensor([1])), ("x", "y"),
        (torch.tensor([1.0, 1.0]), torch.tensor([float("inf"), 1.0])),
        (torch.tensor(1.0), (1.0, 2.0)), (np.array(1.0), (1.0, 2.0)), (torch.tensor(1.0), {"a"}), ((1 / 0 for _ in "a"), [1.0]), ([["a"], ["b"]], {"a", "b"}),
    ],
)  # fmt: skip
def test_different(found, expected) -> None:
    problem = difference(found, expected)
    assert problem is not None and problem.text.endswith(".") and len(problem.text) < 300


def test_a_number_that_python_itself_does_not_print_has_a_sentence() -> None:
    for expected in (3, 0.5, "a", [1], torch.ones(2)):
        problem = difference(-(10**5000), expected)
        assert problem is not None and len(problem.text) < 200


def test_a_whole_number_may_be_asked_for_as_one() -> None:
    assert difference(3, 3, whole=True) is None and difference(np.int32(3), 3, whole=True) is None
    assert difference(torch.tensor(3), 3, whole=True) is None
    for found in (3.0, True, torch.tensor(3.0), np.float64(3)):
        assert difference(found, 3, whole=True) is not None


def test_another_shape_or_type_is_told_apart_from_another_value_and_the_value_is_not_told() -> None:
    assert difference(X.T[:1], X).in_kind and not difference(X + 1, X).in_kind
    assert "17.25" not in difference(3.0, 17.25).text
