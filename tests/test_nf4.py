"""`lora_course.nf4`: codes and constants equal bitsandbytes bit for bit; errors and sizes are those of the paper."""

import math

import pytest
import torch
from bitsandbytes import functional as bnbf
from torch import Tensor, nn

from lora_course import nf4
from lora_course.nf4 import dequantize_nf4, nf4_codebook, quantize_nf4, storage_bits
from lora_course.qlora import (
    quantize_model,
    stored_bytes,
)
from tests.models import same_bits

pytestmark = pytest.mark.usefixtures("uncompiled")


SHAPES = [
    (64,),
    (1,),
    (7,),
    (65,),
    (3, 5),
    (33, 31),
    (129, 257),
    (128, 192),
    (256, 704),
    (5, 13108),
    (1000, 577),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantize_bnb(
    weight: Tensor, block_size: int = 64, double_quant: bool = True
) -> tuple[Tensor, bnbf.QuantState]:
    return bnbf.quantize_4bit(
        weight, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
    )


def assert_equals_bitsandbytes(
    weight: Tensor, block_size: int = 64, double_quant: bool = True
) -> None:
    ours = quantize_nf4(weight, block_size, double_quant)
    packed, state = quantize_bnb(weight, block_size, double_quant)
    assert same_bits(ours.codes, packed)
    assert same_bits(ours.absmax, state.absmax)
    if double_quant:
        assert same_bits(ours.nested_absmax, state.state2.absmax)
        assert same_bits(ours.offset, state.offset)
    else:
        assert ours.nested_absmax is None and ours.offset is None
    assert same_bits(dequantize_nf4(ours), bnbf.dequantize_4bit(packed, state).view(weight.shape))


def test_codebooks_derived_from_their_definitions_equal_the_tables_of_bitsandbytes() -> None:
    assert same_bits(nf4_codebook(), bnbf.get_4bit_type("nf4", device="cpu"))
    assert same_bits(nf4.dynamic_codebook(), bnbf.create_dynamic_map())


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_constants_equal_bitsandbytes_on_any_shape(
    dtype: torch.dtype, double_quant: bool
) -> None:
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(math.prod(shape))
        assert_equals_bitsandbytes(
            (0.02 * torch.randn(shape, generator=generator)).to(dtype), double_quant=double_quant
        )


@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_codes_and_constants_equal_bitsandbytes_at_other_block_sizes(block_size: int) -> None:
    assert_equals_bitsandbytes(
        torch.randn(100, 700, generator=torch.Generator().manual_seed(1)), block_size
    )


@pytest.mark.parametrize("double_quant", [True, False])
def test_special_blocks_equal_bitsandbytes(double_quant: bool) -> None:
    codebook, generator = nf4_codebook(), torch.Generator().manual_seed(0)
    ties = torch.cat([torch.ones(1), (codebook[:-1] + codebook[1:]) / 2]).repeat(4)
    sizes = torch.rand(40, 1, generator=generator)
    special = {
        "ties up to the rounding of a division": (sizes * ties).flatten(),
        **{
            f"the same in the last, partial block, {i}": sizes[i] * ties[:33]
            for i in range(len(sizes))
        },
        "zeros": torch.zeros(200),
        "a block of zeros among others": torch.cat(
            [torch.randn(64, generator=generator), torch.zeros(64), torch.ones(70)]
        ),
        "zeros at the end": torch.cat([torch.randn(64, generator=generator), torch.zeros(9)]),
        "ties": ties,
        "ties in the last, partial block": ties[:33],
        "all blocks alike, so that no constant differs from the mean": torch.ones(64 * 300),
        "subnormal": torch.full((130,), 1e-40),
        "heavy tails: many constants near their mean": torch.randn(64 * 2000, generator=generator)
        ** 5,
        "negative zero": torch.tensor([-0.0, 1.0, -1.0]),
    }
    for name, weight in special.items():
        try:
            assert_equals_bitsandbytes(weight, double_quant=double_quant)
        except AssertionError as error:
            raise AssertionError(name) from error


def test_every_entry_of_the_table_behind_the_constants_equals_bitsandbytes() -> None:
    edges = ((torch.arange(1, 65536).double() - 0.5) / 65535 * 2 - 1).float()
    for values in (edges, edges.nextafter(torch.tensor(-2.0)), edges.nextafter(torch.tensor(2.0))):
        blocks = nn.functional.pad(values, (0, 1)).view(-1, 256)
        blocks = torch.cat(
            [torch.ones(256, 1), -torch.ones(256, 1), blocks[:, 2:]], 1
        )  # every constant 1, the mean about 0
        absmax = torch.cat([blocks.flatten(), -blocks.flatten()])
        codes, nested, offset = nf4.quantize_constants(absmax)
        expected, state = bnbf.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
        assert (
            same_bits(codes, expected)
            and same_bits(nested, state.absmax)
            and same_bits(offset, absmax.mean())
        )


def test_error_is_at_most_half_the_widest_gap_without_double_quantisation() -> None:
    weight = torch.randn(512, 640, generator=torch.Generator().manual_seed(3))
    error = (dequantize_nf4(quantize_nf4(weight, double_quant=False)) - weight).abs().view(-1, 64)
    worst = (error / weight.view(-1, 64).abs().amax(1, keepdim=True)).max().item()
    # 0.15190 is (1 − 0.69619) / 2, plus rounding; with 5,120 blocks the worst case is nearly met.
    assert 0.14 < worst <= 0.1519037


def test_quantising_again_changes_nothing_without_double_quantisation() -> None:
    weight = torch.randn(300, 130, generator=torch.Generator().manual_seed(4))
    once = quantize_nf4(weight, double_quant=False)
    again = quantize_nf4(dequantize_nf4(once), double_quant=False)
    assert same_bits(once.codes, again.codes) and same_bits(once.absmax, again.absmax)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    "n", [1, 7, 64, 65, 128, 1000, 64 * 256, 64 * 256 + 1, 256 * 704, 3 * 64 * 256 + 5]
)
def test_stored_bytes_equal_the_formula_exactly(n: int, double_quant: bool) -> None:
    weight = torch.randn(1, n)
    bits = storage_bits(n, double_quant=double_quant)
    assert 8 * quantize_nf4(weight, double_quant=double_quant).nbytes == pytest.approx(
        bits * n, abs=1e-6
    )
    model = nn.ModuleDict({"linear": nn.Linear(n, 1, bias=False)})
    assert 8 * stored_bytes(quantize_model(model, double_quant=double_quant)) == pytest.approx(
        bits * n, abs=1e-6
    )


def test_storage_is_the_formula_of_the_paper_for_whole_blocks() -> None:
    for n in (64, 4096, 64 * 257, 3584 * 3584):
        assert storage_bits(n) == pytest.approx(
            4 + 8 / 64 + 32 * (math.ceil(n / 64 / 256) + 1) / n, rel=1e-15
        )
        assert storage_bits(n, double_quant=False) == 4.5
    assert storage_bits(3584 * 18944) == pytest.approx(4.127, abs=5e-4)


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (torch.tensor([1.0, math.nan]), ValueError, "inf or nan"),
        (torch.tensor([1.0, math.inf]), ValueError, "inf or nan"),
        (torch.zeros(0), ValueError, "empty"),
        (torch.zeros(4, dtype=torch.float64), TypeError, "float64"),
    ],
)
def test_weights_that_have_no_codes_are_refused(
    weight: Tensor, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        quantize_nf4(weight)
    with pytest.raises(ValueError, match="block_size=0"):
        quantize_nf4(torch.ones(4), block_size=0)
    with pytest.raises(ValueError, match="n=0"):
        storage_bits(0)
