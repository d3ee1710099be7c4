"""bf16's numbers on a processor without bf16: products summed in fp32 and rounded once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_course.arguments import compute_dtype
from lora_course.experiments.precision import ProductsInFp32, precision_of


@pytest.fixture
def factors() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 33).bfloat16(), torch.randn(7, 33).bfloat16()


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_the_wide_one_rounded(
    factors: tuple[torch.Tensor, torch.Tensor], bias: bool
) -> None:
    x, w = factors
    b = torch.arange(7.0).bfloat16() if bias else None
    with ProductsInFp32():
        y = torch.nn.functional.linear(x, w, b)
    wide = x.float() @ w.float().T + (0 if b is None else b.float())
    assert torch.equal(y, wide.bfloat16())


def test_so_are_the_products_of_its_gradient(factors: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, w = (f.clone().requires_grad_() for f in factors)
    towards = torch.randn(5, 7).bfloat16()
    with ProductsInFp32():
        (x @ w.T).backward(towards)
    assert torch.equal(x.grad, (towards.float() @ w.float()).bfloat16())
    assert torch.equal(w.grad, (towards.float().T @ x.float()).bfloat16())


class Products(TorchDispatchMode):
    """Notes in which dtypes the processor is asked for matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm", "linear"):
            self.asked += [a.dtype for a in args if isinstance(a, torch.Tensor)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [(4,), (2, 4)], ids=["mm", "bmm"])
def test_the_processor_is_asked_for_no_product_in_bf16(rows: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(16, 8), torch.randn(*rows, 16)

    def gradient() -> torch.Tensor:
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            loss = (y @ y.mT).square().sum()
        loss.backward()
        return layer.weight.grad.clone()

    with Products() as alone:
        own = gradient()
    assert torch.bfloat16 in alone.asked  # else there is nothing to be replaced
    with Products() as beneath, ProductsInFp32():
        ours = gradient()
    assert beneath.asked and set(beneath.asked) == {torch.float32}
    assert (
        ours - own
    ).norm() < 2**-5 * own.norm()  # bf16 keeps eight bits, and the loss is of fourth order


def test_other_dtypes_pass_untouched() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    with ProductsInFp32():
        assert (x @ x.T).dtype == torch.float64
        assert (x.float() @ x.float().T).dtype == torch.float32


@pytest.mark.parametrize(
    ("native", "recorded", "emulated"),
    [(False, "bfloat16", True), (True, "bfloat16", False), (False, "float32", False)],
)
def test_a_record_in_bf16_needs_it_on_a_cpu_without(
    monkeypatch: pytest.MonkeyPatch, native: bool, recorded: str, emulated: bool
) -> None:
    monkeypatch.delenv("LORA_COURSE_CPU_DTYPE", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with precision_of(recorded):
        assert str(compute_dtype("cpu")) == f"torch.{recorded}"
        modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        assert any(isinstance(mode, ProductsInFp32) for mode in modes) == emulated
