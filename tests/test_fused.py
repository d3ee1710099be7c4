"""`lora_course.fused`: the fused step against the plain one, its memory, and what it costs nobody to merge."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.autograd import gradcheck

from lora_course.checkpoint import load_adapter, save_adapter
from lora_course.export import export_peft
from lora_course.fused import FusedLoRA, FusedLoRALinear
from lora_course.injection import adapter_layers, inject, merge, unload, unmerge
from lora_course.lab.memory import saved_bytes
from lora_course.lora import LARGEST_COPIED_RANK, LoRALinear
from lora_course.qlora import quantize_model
from lora_course.states import factor_state, use_adapter
from tests.models import batch, config, qwen, randomize, relative
from tests.tolerances import EXACT, ROUNDED


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7)])
def test_the_gradient_by_hand_is_the_functions_derivative(shape: tuple[int, ...], p: float) -> None:
    torch.manual_seed(0)
    base = nn.Linear(7, 5).double().requires_grad_(False)
    x, A, B = (
        torch.randn(size, dtype=torch.double, requires_grad=True)
        for size in (shape, (3, 7), (5, 3))
    )

    def fused(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)  # the same mask at every evaluation
        return FusedLoRA.apply(x, A, B, base, 1.7, p)

    assert gradcheck(fused, (x, A, B))


def both(base: nn.Module | None = None, **fields: object) -> dict[str, nn.Module]:
    """The same base with the same random factors, plain and fused."""
    base = base or qwen()
    return {
        name: randomize(inject(copy.deepcopy(base), config(**fields), layer=layer)).train()
        for name, layer in (("plain", LoRALinear), ("fused", FusedLoRALinear))
    }


def step(
    model: nn.Module, autocast: bool = False, seed: int = 5
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and the gradients of a training step."""
    torch.manual_seed(seed)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = model(**batch(), use_cache=False)
    found.loss.backward()
    return found.logits.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def assert_equal_steps(models: dict[str, nn.Module], tolerance: float, **how: object) -> None:
    (expected, gradients), (found, others) = (
        step(models["plain"], **how),
        step(models["fused"], **how),
    )
    assert (
        relative(found.float(), expected.float()) < tolerance and len(gradients) == len(others) > 0
    )
    for gradient, other in zip(gradients, others, strict=True):
        assert gradient.dtype == other.dtype and relative(other, gradient) < tolerance


@pytest.mark.parametrize("fields", [
    {}, {"r": LARGEST_COPIED_RANK}, {"r": LARGEST_COPIED_RANK + 2}, {"lora_dropout": 0.4}, {"use_rslora": True, "target_modules": ["v_proj", "down_proj"]},
    {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"k_proj": 7}},
], ids=str)  # fmt: skip
def test_a_fused_step_equals_the_plain_one(fields: dict) -> None:
    assert_equal_steps(both(**fields), 2e-5)  # fp32, sums in another order


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing_it_drops_the_same_elements_both_times(
    reentrant: bool,
) -> None:
    models = both(lora_dropout=0.4)
    expected = step(models["plain"])[1]
    for model in models.values():
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    assert_equal_steps(models, 2e-5)
    for gradient, other in zip(expected, step(models["fused"])[1], strict=True):
        assert relative(other, gradient) < 2e-5


def test_autocast_and_bf16_bases() -> None:
    # bf16 keeps 8 bits, and a handful of roundings differ along two blocks
    assert_equal_steps(both(lora_dropout=0.2), 0.05, autocast=True)
    assert_equal_steps(both(qwen().bfloat16()), 0.05)
    layer = next(iter(adapter_layers(both(qwen().bfloat16())["fused"]).values()))
    y = layer(torch.randn(3, layer.in_features, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and layer.A.grad.dtype == torch.float32


@pytest.mark.parametrize("autocast", [False, True])
def test_a_4bit_base(autocast: bool) -> None:
    base = quantize_model(qwen(), compute_dtype=torch.bfloat16 if autocast else torch.float32)
    assert_equal_steps(both(base, lora_dropout=0.3), 0.05 if autocast else 1e-4, autocast=autocast)


def test_accumulated_and_partly_frozen_gradients() -> None:
    models = both()
    for model in models.values():
        for layer in adapter_layers(model).values():
            layer.A.requires_grad_(False)
    assert_equal_steps(models, 2e-5)
    once = step(models["fused"])[1]
    models["fused"](**batch()).loss.backward()  # a second time on top
    for layer, gradient in zip(adapter_layers(models["fused"]).values(), once, strict=True):
        assert layer.A.grad is None and relative(layer.B.grad, 2 * gradient) < 1e-5


def test_trained_steps_equal_plain_ones() -> None:
    models = both()
    for model in models.values():
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9
        )
        for t in range(6):
            step(model, seed=t)
            optimizer.step()
    a, b = (factor_state(model) for model in models.values())
    start = factor_state(both()["plain"])
    for key in a:
        assert relative(b[key], a[key]) < 1e-4 and (
            key.endswith("scaling") or relative(a[key], start[key]) > 1e-3
        )


def kept_bytes(layer: torch.nn.Module, autocast: bool = False) -> int:
    """Bytes that a forward pass on 32 rows keeps for the backward one."""
    x = torch.randn(32, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return saved_bytes(layer, lambda: layer(x))


@pytest.mark.parametrize(("p", "autocast"), [(0.0, False), (0.3, False), (0.0, True), (0.3, True)])
def test_it_keeps_x_and_a_byte_of_mask_an_element_whatever_the_rank(
    p: float, autocast: bool
) -> None:
    for r in (2, 16):
        fused = FusedLoRALinear(nn.Linear(40, 24), r, 8, p)
        assert kept_bytes(fused, autocast) == 32 * 40 * (4 + (1 if p else 0))
        plain = kept_bytes(LoRALinear(nn.Linear(40, 24), r, 8, p), autocast)
        size = 2 if autocast else 4
        assert (
            plain >= 32 * 40 * size + 32 * r * size
        )  # and x itself where it was cast, the mask, a cast weight


def test_it_is_a_plain_layer_to_checkpoints_peft_and_other_layers(tmp_path: Path) -> None:
    model = both(lora_dropout=0.1)["fused"].eval()
    reference = model(**batch()).logits.detach()
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(qwen(), tmp_path / "adapter")
    assert {type(layer) for layer in adapter_layers(again).values()} == {FusedLoRALinear}
    torch.testing.assert_close(again.eval()(**batch()).logits, reference, **EXACT)
    plain = use_adapter(inject(qwen(), config()), factor_state(model)).eval()
    torch.testing.assert_close(plain(**batch()).logits, reference, **ROUNDED)
    fused = use_adapter(inject(qwen(), config(), layer=FusedLoRALinear), factor_state(plain)).eval()
    torch.testing.assert_close(fused(**batch()).logits, reference, **ROUNDED)
    export_peft(model, tmp_path / "peft")
    theirs = PeftModel.from_pretrained(qwen(), tmp_path / "peft").eval()
    torch.testing.assert_close(theirs(**batch()).logits, reference, **ROUNDED)


def test_what_the_fused_layer_refuses() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match="Doubled has a forward pass of its own.*use LoRALinear"):
        FusedLoRALinear(Doubled(4, 4), 2, 2)
    layer = FusedLoRALinear(nn.Linear(4, 3), 2, 2)
    nn.init.normal_(layer.B)
    x = torch.randn(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
    y = layer(x)
    layer.merge()  # between forward and backward: the weight is another one now
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    offloaded = FusedLoRALinear(nn.Linear(4, 3), 2, 2)
    offloaded.base_layer.to("meta")
    with pytest.raises(RuntimeError, match="offloaded"):
        offloaded(x)


def test_disabled_merged_and_empty() -> None:
    torch.manual_seed(0)
    layer = FusedLoRALinear(nn.Linear(4, 3), 2, 6).train()
    nn.init.normal_(layer.B)
    x = torch.randn(5, 4)
    y = layer(x).detach()
    layer.enabled = False
    torch.testing.assert_close(layer(x), layer.base_layer(x), **EXACT)
    layer.enabled = True
    assert layer(torch.randn(0, 4)).shape == (0, 3)
    layer.merge()
    merged = layer(x)
    torch.testing.assert_close(merged, y, **ROUNDED)
    assert (
        not merged.requires_grad and not layer.base_layer.weight.requires_grad
    )  # nothing would train, W least of all


@pytest.mark.parametrize(
    ("dtype", "bound", "restored"),
    [(torch.float32, 2e-6, 1e-6), (torch.float16, 5e-3, 5e-3), (torch.bfloat16, 4e-2, 4e-2)],
    ids=str,
)
@pytest.mark.parametrize("kind", [LoRALinear, FusedLoRALinear])
def test_merged_equals_unmerged_and_unmerging_restores_to_rounding(
    kind: type, dtype: torch.dtype, bound: float, restored: float
) -> None:
    model = randomize(inject(qwen().to(dtype), config(), layer=kind))
    before = {
        name: layer.base_layer.weight.clone() for name, layer in adapter_layers(model).items()
    }
    base = qwen().to(dtype)(**batch()).logits
    with torch.no_grad():
        reference = model(**batch()).logits
        assert relative(reference, base) > 10 * bound  # the adapter does something
        merge(model)
        assert relative(model(**batch()).logits, reference) < bound
        with pytest.raises(RuntimeError, match="merged already"):
            merge(model)
        unmerge(model)
        for name, layer in adapter_layers(model).items():
            assert relative(layer.base_layer.weight, before[name]) < restored


def test_saved_while_merged_it_is_applied_once(tmp_path: Path) -> None:
    model = randomize(inject(qwen(), config(), layer=FusedLoRALinear)).eval()
    reference = model(**batch()).logits.detach()
    merge(model)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(
        load_adapter(qwen(), tmp_path).eval()(**batch()).logits, reference, **ROUNDED
    )
    plain = unload(model)
    torch.testing.assert_close(plain(**batch()).logits, reference, **ROUNDED)
    assert not any(isinstance(module, LoRALinear) for module in plain.modules())


def test_a_4bit_base_refuses_to_merge() -> None:
    model = randomize(inject(quantize_model(qwen()), config(), layer=FusedLoRALinear))
    with pytest.raises(TypeError, match="4-bit"):
        merge(model)


def test_what_follows_may_change_the_output_in_place() -> None:
    torch.manual_seed(0)
    ours, plain = (
        nn.Sequential(kind(nn.Linear(12, 10), r=3, lora_alpha=6), nn.ReLU(inplace=True))
        for kind in (FusedLoRALinear, LoRALinear)
    )
    ours.load_state_dict(plain.state_dict())
    for model in (ours, plain):
        nn.init.normal_(model[0].B, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 5, 12)
    for model in (ours, plain):
        model(x).square().sum().backward()
    torch.testing.assert_close(ours(x), plain(x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours[0].A.grad, plain[0].A.grad, atol=1e-5, rtol=1e-5)
