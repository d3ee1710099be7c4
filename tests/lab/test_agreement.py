"""How far two tensors lie apart."""

import pytest
import torch

from lora_course import lab


def test_an_error_is_relative_to_what_is_expected() -> None:
    expected = torch.tensor([[3.0, 0.0], [0.0, 4.0]], requires_grad=True)
    found = torch.tensor([[3.0, 1.0], [0.0, 4.0]])
    assert lab.relative_error(found, expected) == pytest.approx(0.2)  # 1 of 5
    assert lab.relative_error(expected, found) == pytest.approx(26**-0.5)  # not symmetric
    assert lab.relative_error(expected, expected) == 0


def test_sixteen_bits_are_compared_in_fp32() -> None:
    expected = torch.full((4096,), 3.0, dtype=torch.float16)  # whose squares fp16 can't sum
    assert lab.relative_error(expected * 2, expected) == pytest.approx(1)
