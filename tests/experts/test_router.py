"""`experts.router`: no future token in a gate, padding, caches, and models without one stack of blocks."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from torch import Tensor, nn

from lora_course.experts import (
    ExpertsLinear,
    latest_gates,
    mask_prefix,
)
from lora_course.injection import adapter_layers, disabled, inject, unload
from lora_course.lora import LoRALinear
from tests.experts.models import CLOSE, IDS, MODES, gradients, logits, mixture
from tests.models import batch, config, qwen
from tests.tolerances import EXACT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("arguments", MODES, ids=str)
def test_no_future_token_changes_an_earlier_logit(arguments: dict) -> None:
    model = mixture(**arguments)
    before = logits(model, IDS)
    for position in range(1, 9):
        changed = IDS.clone()
        changed[:, position] = (changed[:, position] + 1) % 97
        after = logits(model, changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], **EXACT)
        assert not torch.allclose(after[:, position], before[:, position], atol=1e-3)


def test_a_sequence_gate_is_one_for_all_tokens_after_the_prefix_and_equal_within_it() -> None:
    model = mixture(gate_by="sequence", prefix=4)
    logits(model, IDS)
    for gates in latest_gates(model).values():
        torch.testing.assert_close(gates[:, :4], torch.full((3, 4, 3), 1 / 3))
        torch.testing.assert_close(gates[:, 4:], gates[:, 4:5].expand(-1, 5, -1), **EXACT)
        assert gates[:, 4].std(0).max() > 1e-3


def padded(side: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    rows = [IDS[0], IDS[1, :6], IDS[2, :2]]
    ids, mask = torch.full((3, 9), 7), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(9 - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask, rows


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("arguments", MODES, ids=str)
def test_padding_changes_nothing(arguments: dict, side: str) -> None:
    model = mixture(**arguments)
    ids, mask, rows = padded(side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(
            together[i][mask[i].bool()], logits(model, row[None])[0], **CLOSE
        )


@pytest.mark.parametrize("arguments", MODES, ids=str)
def test_cached_generation_equals_the_full_forward(arguments: dict) -> None:
    """Left-padded prompts of 9, 6 and 2 tokens: the last one's prefix ends among the tokens it writes."""
    model = mixture(**arguments)
    ids, mask, rows = padded("left")
    written = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    for i, row in enumerate(rows):
        text = torch.cat([row, written.sequences[i, 9:]])
        full = logits(model, text[None])[0, len(row) - 1 : -1]
        torch.testing.assert_close(torch.stack([step[i] for step in written.logits]), full, **CLOSE)


def test_beam_search_moves_the_sums_of_short_prompts_with_their_rows() -> None:
    model = mixture(gate_by="sequence", prefix=6)
    model.generation_config.pad_token_id = 0
    for length in (1, 2, 9):
        found = model.generate(
            IDS[:, :length], attention_mask=torch.ones(3, length, dtype=torch.long), num_beams=4, max_new_tokens=8,
            do_sample=False, eos_token_id=None, length_penalty=1.0, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        for row, score in zip(found.sequences, found.sequences_scores, strict=True):
            full = logits(model, row[None]).log_softmax(-1)[0, length - 1 : -1]
            expected = full.gather(1, row[length:, None]).sum() / 8
            torch.testing.assert_close(score, expected, **CLOSE)


def test_a_cache_can_be_copied_and_one_that_the_gates_did_not_see_is_refused() -> None:
    model = mixture(gate_by="sequence", prefix=4)
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :5], use_cache=True).past_key_values
        again = model(input_ids=IDS[:, 5:], past_key_values=copy.deepcopy(cache)).logits
        torch.testing.assert_close(again, logits(model, IDS)[:, 5:], **CLOSE)
        torch.testing.assert_close(
            model(input_ids=IDS[:, 5:], past_key_values=cache).logits, again, **EXACT
        )
        with disabled(model):
            foreign = model(input_ids=IDS[:, :5], use_cache=True).past_key_values
        with pytest.raises(RuntimeError, match="filled with the experts off"):
            model(input_ids=IDS[:, 5:], past_key_values=foreign)
        cache.crop(-7)
        with pytest.raises(RuntimeError, match=r"holds \[2, 2, 2\].*have seen \[4, 4, 4\]"):
            model(input_ids=IDS[:, 2:], past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask \[3, 9\]"):
            model(input_ids=IDS, attention_mask=torch.ones(3, 1, 9, 9, dtype=torch.bool))


def test_labels_of_prefix_and_padding_are_not_scored() -> None:
    labels = torch.arange(10).reshape(2, 5)
    assert mask_prefix(labels, 2).tolist() == [[-100, -100, 2, 3, 4], [-100, -100, 7, 8, 9]]
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert mask_prefix(labels, 2, mask).tolist() == [
        [-100, -100, -100, -100, 4],
        [-100, -100, 7, 8, -100],
    ]


def test_autocast_leaves_the_router_in_fp32() -> None:
    model = mixture()
    expected = model(**batch()).loss
    first = latest_gates(model)["model.layers.0"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch()).loss
    loss.backward()
    torch.testing.assert_close(
        latest_gates(model)["model.layers.0"], first, **EXACT
    )  # the embeddings are in fp32 either way
    assert abs(loss - expected) < 0.05  # bf16 keeps 8 bits
    assert all(
        p.grad.dtype == torch.float32 and p.grad.abs().max() > 0
        for p in model.parameters()
        if p.requires_grad
    )


def test_copies_and_pickles_are_independent_and_unload_leaves_nothing() -> None:
    model = mixture(gate_by="sequence", prefix=3)
    expected = logits(model, IDS)
    gradients(model)  # gates with a graph, which torch does not copy
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(other.eval(), IDS), expected, **EXACT)
        for layer in adapter_layers(other).values():
            nn.init.zeros_(layer.B)
        torch.testing.assert_close(logits(other, IDS), logits(qwen(), IDS), **EXACT)
        unload(other)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in other.modules())
        torch.testing.assert_close(logits(other, IDS), logits(qwen(), IDS), **EXACT)
    torch.testing.assert_close(logits(model.eval(), IDS), expected, **EXACT)
    with disabled(model):
        torch.testing.assert_close(logits(model, IDS), logits(qwen(), IDS), **EXACT)


def test_a_base_that_is_kept_elsewhere_works() -> None:
    offloaded = cpu_offload(qwen(), execution_device="cpu")
    assert offloaded.model.layers[0].mlp.up_proj.weight.is_meta
    model = mixture(base=offloaded)
    torch.testing.assert_close(logits(model, IDS), logits(mixture(), IDS), **CLOSE)
    gradients(model)


def test_models_without_one_stack_of_blocks_are_refused_and_left_as_they_were() -> None:
    plain = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="decoder blocks"):
        inject(plain, LoraConfig(r=2, target_modules=["a", "b"]), ExpertsLinear)
    model = qwen()
    with pytest.raises(ValueError, match="decoder blocks"):
        inject(model, config(target_modules=["q_proj", "lm_head"]), ExpertsLinear)
    for module in (plain, model):
        assert not any(isinstance(m, LoRALinear) or m._forward_pre_hooks for m in module.modules())
        assert all(p.requires_grad for p in module.parameters()) and not hasattr(
            module, "lora_course"
        )


def test_packed_documents_are_refused_by_a_gate_that_would_see_the_first_alone() -> None:
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 3)
    model = mixture(gate_by="sequence", prefix=3)
    with pytest.raises(ValueError, match="packed documents"):
        model(input_ids=IDS, position_ids=packed)
    mixture()(input_ids=IDS, position_ids=packed)
