"""`quantized.grid`: errors, scales, torch's fake quantisation, packed integers."""

import pytest
import torch

from lora_course.quantized import (
    dequantize,
    fake_quantize,
    pack,
    quantize,
    unpack,
)
from tests.models import relative
from tests.quantized.models import GRIDS


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12, 16])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_error_is_at_most_half_a_step_and_quantising_twice_changes_nothing(
    grid: dict, bits: int
) -> None:
    x = normal(7, 48) * torch.logspace(-6, 3, 7)[:, None]  # rows of very different size
    codes, scale = quantize(x, bits, **grid)
    step = dequantize(torch.ones_like(codes), scale, **grid)
    values = fake_quantize(x, bits, **grid)
    # x / step and code · step are rounded: 2^-24 of a number that is up to 2^bits half steps
    assert ((x - values).abs() <= step / 2 * (1 + 2.0 ** (bits - 22))).all() and (
        x - values
    ).abs().max() > 0
    assert codes.abs().max() == 2 ** (bits - 1) - 1 and (scale > 0).all()
    assert scale.numel() == {"tensor": 1, "channel": 7, "group": 21}[grid["granularity"]]
    assert torch.equal(values, dequantize(codes, scale, **grid))
    if (
        bits <= 8
    ):  # codes · scale is exact: whoever multiplies, in whatever order, gets these numbers
        assert torch.equal(values.double(), codes.double() * step.double())
    again = fake_quantize(values, bits, **grid)
    assert torch.equal(again, values) if bits <= 8 else relative(again, values) < 2.0 ** -(bits - 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantising_twice_is_exact_for_every_size_of_the_largest_number(bits: int) -> None:
    largest = torch.linspace(1, 2, 2**16 + 1)[:, None]  # a row each, over a whole power of two
    x = torch.cat(
        [largest, largest * torch.rand(largest.shape, generator=torch.Generator().manual_seed(0))],
        1,
    )
    values = fake_quantize(x, bits, "channel")
    assert torch.equal(fake_quantize(values, bits, "channel"), values)


def test_groups_lie_within_a_row_and_each_has_a_scale_of_its_own() -> None:
    x = normal(3, 10)
    x[1, 4:8] *= 1000
    large = fake_quantize(x, 3, "group", 4)
    alone = torch.cat(
        [
            torch.cat([fake_quantize(part, 3, "tensor") for part in row[None].split(4, 1)], 1)
            for row in x
        ]
    )
    assert torch.equal(large, alone)
    rest = torch.ones(3, 10, dtype=torch.bool)
    rest[1, 4:8] = False
    assert relative(large[rest], x[rest]) < 0.25  # one large group spoils no other …
    assert not fake_quantize(x, 3, "tensor")[rest].any()  # … which one scale for all does


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("tiny", [0.0, 1e-42, 3e-39, 1e-30])
def test_zeros_and_the_smallest_numbers_give_no_nan(grid: dict, tiny: float) -> None:
    x = torch.full((4, 48), tiny, requires_grad=True)
    values = fake_quantize(x, 4, **grid)
    values.sum().backward()
    assert values.isfinite().all() and (quantize(x.detach(), 4, **grid)[1] > 0).all()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert (values - x).abs().max() <= max(tiny, 1e-38)


def test_what_is_not_finite_stays_visible() -> None:
    x = normal(2, 8)
    x[1, 3] = float("inf")
    assert (
        fake_quantize(x, 4, "channel")[1].isnan().any()
        and fake_quantize(x, 4, "channel")[0].isfinite().all()
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_and_gradients_equal_torchs_fake_quantisation(bits: int) -> None:
    x = normal(6, 40).requires_grad_()
    weight, top = normal(6, 40, seed=1), 2 ** (bits - 1) - 1
    for clip in (1.0, 0.4):
        for granularity in ("tensor", "channel"):
            _, scale = quantize(x.detach(), bits, granularity, clip=clip)
            if granularity == "tensor":
                theirs = torch.fake_quantize_per_tensor_affine(x, scale.item(), 0, -top, top)
            else:
                theirs = torch.fake_quantize_per_channel_affine(
                    x, scale, torch.zeros(6, dtype=torch.int32), 0, -top, top
                )
            ours = fake_quantize(x, bits, granularity, clip=clip)
            torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-6)
            (expected,) = torch.autograd.grad((theirs * weight).sum(), x)
            (found,) = torch.autograd.grad((ours * weight).sum(), x)
            assert torch.equal(found, expected)
            assert bool((found == 0).any()) == (
                clip < 1
            )  # what is cut gets no gradient; with clip 1 nothing is cut


def test_recorded_errors_of_a_random_update_come_out() -> None:
    """Relative error of B A, r = 8, normal factors: figures from one random pair of another shape, so to a fifth."""
    errors = {}
    for bits, granularity in ((8, "tensor"), (4, "tensor"), (4, "group"), (2, "tensor")):
        found = []
        for seed in range(4):
            A, B = normal(8, 256, seed=seed), normal(256, 8, seed=10 + seed)
            quantised = fake_quantize(B.T, bits, granularity).T @ fake_quantize(
                A, bits, granularity
            )
            found.append(relative(quantised, B @ A))
        errors[bits, granularity] = sum(found) / 4
    expected = {
        (8, "tensor"): 0.012,
        (4, "tensor"): 0.209,
        (4, "group"): 0.149,
        (2, "tensor"): 1.05,
    }
    assert errors == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("bits", range(2, 17))
def test_packing_takes_exactly_these_bits_and_gives_the_integers_back(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    codes = torch.randint(-top, top + 1, (5, 7), generator=torch.Generator().manual_seed(bits)).to(
        torch.int16
    )
    codes[0, :2] = torch.tensor([-top, top])
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-35 * bits // 8)
    assert torch.equal(unpack(packed, bits, codes.shape), codes)
    with pytest.raises(ValueError, match="bytes are no 36 numbers"):
        unpack(pack(torch.zeros(100), bits), bits, (36,))


def test_two_numbers_of_four_bits_lie_in_a_byte_lowest_first() -> None:
    assert pack(torch.tensor([-7, 7, 0]), 4).tolist() == [0 + 16 * 14, 7]
