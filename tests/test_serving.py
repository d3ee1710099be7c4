"""`lora_course.serving`: each row of a batch with its own adapter, against rows one by one and PEFT, and what is refused."""

import copy
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_course.checkpoint import save_adapter
from lora_course.injection import adapter_layers, disabled, inject, merge, unload
from lora_course.lora import LoRALinear
from lora_course.qlora import quantize_model
from lora_course.serving import AdapterBatchLinear, load_adapters, row_adapters
from lora_course.states import adapter_state, factor_state, split_state, use_adapter
from tests.models import batch, config, qwen, randomize, relative
from tests.tolerances import ROUNDED

FIELDS = {
    "law": {"r": 3, "lora_alpha": 12},
    "code": {"r": 5, "lora_alpha": 5, "use_rslora": True},
    "verse": {"r": 2, "lora_alpha": 9, "target_modules": ["q_proj", "down_proj"]},
}
NAMES = ["code", None, "law", "verse", "code"]


def single(name: str | None) -> nn.Module:
    return (
        qwen()
        if name is None
        else randomize(
            inject(qwen(), config(**FIELDS[name])), seed=list(FIELDS).index(name) + 1
        ).eval()
    )


STATES = {name: factor_state(single(name)) for name in FIELDS}


def served(base: nn.Module | None = None) -> nn.Module:
    return load_adapters(base or qwen(), STATES).eval()


@torch.no_grad()
def test_a_batch_equals_its_rows_one_by_one_and_peft() -> None:
    ids, model = batch(5, 9)["input_ids"], served()
    with row_adapters(model, NAMES):
        together = model(ids).logits
    theirs = get_peft_model(qwen(), config(**FIELDS["law"]), adapter_name="law")
    for name in ("code", "verse"):
        theirs.add_adapter(name, config(**FIELDS[name]))
    for name, state in STATES.items():
        for module, tensors in split_state(state).items():
            peft = theirs.base_model.model.get_submodule(module)
            peft.lora_A[name].weight.data.copy_(tensors["A"])
            peft.lora_B[name].weight.data.copy_(tensors["B"])
    mixed = theirs.eval()(
        input_ids=ids, adapter_names=[name or "__base__" for name in NAMES]
    ).logits
    torch.testing.assert_close(together, mixed, **ROUNDED)
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(together[i], single(name)(ids[i : i + 1]).logits[0], **ROUNDED)
        others = [
            single(other)(ids[i : i + 1]).logits[0] for other in [*FIELDS, None] if other != name
        ]
        assert min(relative(together[i], other) for other in others) > 0.05  # the adapters differ


def test_cached_generation_and_merged_models_write_the_same() -> None:
    ids, model = batch(5, 6)["input_ids"], served()
    kwargs = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with sdpa_kernel(SDPBackend.MATH), row_adapters(model, NAMES):
        together = model.generate(ids, use_cache=True, **kwargs)
        assert torch.equal(together, model.generate(ids, use_cache=False, **kwargs))
    for i, name in enumerate(NAMES):
        alone = single(name)
        if name:
            alone = unload(merge(alone))
        with sdpa_kernel(SDPBackend.MATH):
            assert torch.equal(
                together[i : i + 1], alone.generate(ids[i : i + 1], use_cache=True, **kwargs)
            )


@torch.no_grad()
def test_several_rows_of_a_prompt() -> None:
    ids, model = batch(2, 6)["input_ids"], served()
    kwargs = {
        "max_new_tokens": 5,
        "num_beams": 3,
        "num_return_sequences": 3,
        "pad_token_id": 0,
        "do_sample": False,
    }
    with (
        row_adapters(model, ["law", "code"]),
        pytest.raises(ValueError, match="6 rows and row_adapters.* was given 2 names.*num_beams"),
    ):
        model.generate(ids, **kwargs)
    with row_adapters(model, ["law"] * 3 + ["code"] * 3):
        found = model.generate(ids, **kwargs)
    for i, name in enumerate(("law", "code")):
        assert torch.equal(
            found[3 * i : 3 * i + 3], single(name).generate(ids[i : i + 1], **kwargs)
        )


@torch.no_grad()
def test_types_and_4bit_bases() -> None:
    ids = batch(5, 9)["input_ids"]
    with row_adapters(model := served(qwen().bfloat16()), NAMES):
        found = model(ids).logits
    assert found.dtype == torch.bfloat16
    with row_adapters(exact := served(), NAMES):
        assert relative(found.float(), exact(ids).logits) < 0.05
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(exact(ids).logits.float(), found.float()) < 0.05
        again = exact(ids).logits
    with row_adapters(exact, NAMES):
        assert torch.equal(
            exact(ids).logits, again
        )  # bf16 factors of the block before are not kept
    with row_adapters(model := served(quantize_model(qwen())), NAMES):
        found = model(ids).logits
    alone = use_adapter(
        inject(quantize_model(qwen()), config(**FIELDS["law"])), STATES["law"]
    ).eval()
    assert relative(found[2:3], alone(ids[2:3]).logits) < 1e-4


@torch.no_grad()
def test_rows_hold_within_their_block_and_the_base_comes_back() -> None:
    ids, model = batch(2, 6)["input_ids"], served()
    with row_adapters(model, ["law", "code"]):
        outer = model(ids).logits
        with row_adapters(model, ["code", None]):
            assert not torch.allclose(model(ids).logits, outer, atol=1e-3)
        assert torch.equal(model(ids).logits, outer)
        with disabled(model):
            assert torch.equal(model(ids).logits, qwen()(ids).logits)
    with pytest.raises(RuntimeError, match="which row of the batch uses which"):
        model(ids)
    with row_adapters(model, [None, None]):
        torch.testing.assert_close(model(ids).logits, qwen()(ids).logits, **ROUNDED)
    assert torch.equal(unload(model)(ids).logits, qwen()(ids).logits)


def test_what_serving_refuses(tmp_path: Path) -> None:
    model = served()
    assert not any(p.requires_grad for p in model.parameters())
    for refused in (
        merge,
        adapter_state,
        factor_state,
        lambda m: save_adapter(m, tmp_path),
        lambda m: use_adapter(m, STATES["law"]),
    ):
        with pytest.raises((NotImplementedError, ValueError)):
            refused(model)
    with (
        pytest.raises(ValueError, match="no adapter 'lwa'; there are law, code, verse"),
        row_adapters(model, ["lwa"]),
    ):
        pass
    with pytest.raises(TypeError, match="a list with one name"), row_adapters(model, "law"):
        pass
    with (
        pytest.raises(TypeError, match="LoRALinear, with one adapter"),
        row_adapters(single("law"), ["law"]),
    ):
        pass
    with pytest.raises(ValueError, match="carries an adapter already"):
        load_adapters(model, STATES)
    base = qwen()
    with pytest.raises(ValueError, match="states is empty"):
        load_adapters(base, {})
    renamed = {key.replace("q_proj", "query"): tensor for key, tensor in STATES["law"].items()}
    with pytest.raises(ValueError, match="'law' changes .*query.*no such linear layer"):
        load_adapters(base, {"law": renamed})
    wrong = STATES["law"] | {"model.layers.0.mlp.down_proj.A": torch.zeros(3, 81)}
    with pytest.raises(ValueError, match=r"\[48, 81\]; this model has \[48, 80\] there"):
        load_adapters(base, {"law": wrong})
    with pytest.raises(ValueError, match="factor_state"):
        load_adapters(
            base, {"law": STATES["law"] | {"model.layers.0.mlp.down_proj.E": torch.zeros(3)}}
        )
    assert not any(isinstance(module, LoRALinear) for module in base.modules())


def test_names_that_end_alike_are_told_apart() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base = nn.Sequential(nn.Linear(4, 4), inner)
    state = {"0.A": torch.randn(2, 4), "0.B": torch.randn(4, 2), "0.scaling": torch.tensor(2.0)}
    model = load_adapters(copy.deepcopy(base), {"one": state})
    assert list(adapter_layers(model)) == ["0"] and isinstance(model[0], AdapterBatchLinear)
    x = torch.randn(3, 4)
    with row_adapters(model, ["one", None, "one"]):
        found = model(x)
    expected = base[0](x)
    expected[[0, 2]] += 2 * x[[0, 2]] @ state["0.A"].T @ state["0.B"].T
    torch.testing.assert_close(found, inner(expected), **ROUNDED)
