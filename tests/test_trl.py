"""TRL's SFTTrainer with `AdapterTrainer` in front: answers only, padding, packing, resuming; and what it is without."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from lora_course.checkpoint import load_adapter
from lora_course.injection import adapter_layers, inject
from lora_course.lab.models import NANO
from lora_course.qlora import quantize_model
from lora_course.states import adapter_state
from lora_course.training import AdapterTrainer
from tests.models import SHAPE, config, qwen, randomize
from tests.talks import TALKS, TEMPLATE

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install --no-deps trl")


class AdapterSFTTrainer(AdapterTrainer, trl.SFTTrainer):
    """The recipe: TRL prepares rows and computes the loss, `AdapterTrainer` saves, resumes and adds an auxiliary loss."""


def rows() -> datasets.Dataset:
    talks = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in TALKS
    ]
    return datasets.Dataset.from_dict({"messages": talks})


def model(*targets: str) -> nn.Module:
    targets = targets or ("q_proj", "v_proj", "down_proj")
    return randomize(inject(fresh(), config(target_modules=list(targets))))


def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(NANO)
    found.chat_template = TEMPLATE
    return found


def sft(folder: Path, kind: type = AdapterSFTTrainer, **fields: Any) -> Any:
    settings = {
        "max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 3, "learning_rate": 5e-3,
        "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "assistant_only_loss": True,
        "max_length": SHAPE["max_position_embeddings"], "gradient_checkpointing": False, **fields,
    }  # fmt: skip
    args = trl.SFTConfig(output_dir=str(folder), **settings)
    return kind(model(), args, train_dataset=rows(), processing_class=tokenizer())


def test_the_model_has_its_own_forward_between_trainings(tmp_path: Path) -> None:
    """TRL's calls the model that it was set on: a copy that took it along would compute with the other's weights."""
    trainer = sft(tmp_path, max_steps=1)
    assert "forward" not in vars(trainer.model)
    trainer.train()
    assert "forward" not in vars(trainer.model)
    other = randomize(copy.deepcopy(trainer.model), seed=7)
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.equal(other(ids).logits, trainer.model(ids).logits)


def test_one_forward_pass_is_made_a_batch(tmp_path: Path) -> None:
    trainer = sft(tmp_path, max_steps=2)
    passes: list[int] = []
    trainer.model.model.register_forward_hook(lambda *_: passes.append(1))
    trainer.train()
    assert len(passes) == 2


def test_an_adapter_on_the_head_is_refused(tmp_path: Path) -> None:
    args = trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match="'lm_head' has an adapter.*leave it out"):
        AdapterSFTTrainer(
            model("q_proj", "lm_head"), args, train_dataset=rows(), processing_class=tokenizer()
        )


def test_the_loss_is_of_the_answers_alone_over_padded_rows(tmp_path: Path) -> None:
    trainer = sft(tmp_path, max_steps=1, per_device_train_batch_size=len(TALKS))
    words, losses, count = tokenizer(), 0.0, 0
    plain = model().eval()
    for row in rows():
        given = words.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, answer = given["input_ids"], given["assistant_masks"]
        assert 0 < sum(answer) < len(ids)
        with torch.no_grad():
            logs = plain(input_ids=torch.tensor([ids])).logits.log_softmax(-1)[0]
        places = [place for place, counted in enumerate(answer) if counted]
        losses -= sum(logs[place - 1, ids[place]].item() for place in places)
        count += len(places)
    trainer.train()
    assert trainer.history[0]["loss"] == pytest.approx(losses / count, rel=1e-4)


def test_rows_packed_by_trls_default_strategy_do_not_see_each_other(tmp_path: Path) -> None:
    """The loss of a packed batch is that of its rows one by one, over all answer tokens (the first of a row has no loss)."""
    packed = sft(tmp_path / "a", max_steps=1, packing=True, per_device_train_batch_size=len(TALKS))
    assert packed.args.packing_strategy == "bfd" and len(packed.train_dataset) < len(TALKS)
    padded = sft(tmp_path / "b", max_steps=1, per_device_train_batch_size=len(TALKS))
    losses = []
    for trainer in (packed, padded):
        trainer.train()
        losses.append(trainer.history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    "packing", [{}, {"packing": True}, {"packing": True, "packing_strategy": "wrapped"}]
)
def test_it_is_resumed_to_the_same_weights_and_checkpoints_hold_the_adapter_alone(
    tmp_path: Path, packing: dict[str, Any]
) -> None:
    trainer = sft(tmp_path, **packing)
    trainer.train(resume_from_checkpoint=True)
    expected = adapter_state(trainer.model)
    assert not list(tmp_path.rglob("model*.safetensors"))
    shutil.rmtree(tmp_path / "checkpoint-4")
    again = sft(tmp_path, **packing)
    again.train(resume_from_checkpoint=True)
    found = adapter_state(again.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert again.history == trainer.history and len(again.history) == 4
    loaded = adapter_state(load_adapter(fresh(), tmp_path / "checkpoint-4"))
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match=r"learning_rate is 0\.005 there and 0\.001 here"):
        sft(tmp_path, learning_rate=1e-3, **packing).train(resume_from_checkpoint=True)


def fresh() -> nn.Module:
    base = qwen()
    base.resize_token_embeddings(len(tokenizer()))
    return base


def test_an_auxiliary_loss_is_added_to_trls(tmp_path: Path) -> None:
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none", logging_steps=1,
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    losses = []
    for auxiliary in (None, lambda model: torch.tensor(3.0)):
        trainer = AdapterSFTTrainer(
            model(), args, train_dataset=rows(), processing_class=tokenizer(), auxiliary_loss=auxiliary
        )  # fmt: skip
        trainer.train()
        losses.append(trainer.history[0]["loss"])
    assert losses[1] - losses[0] == pytest.approx(3.0, abs=1e-4)


def test_a_plain_sft_trainer_is_told_what_it_writes_and_can_not_do(tmp_path: Path) -> None:
    trainer = sft(tmp_path, trl.SFTTrainer, max_steps=2)
    with pytest.warns(UserWarning, match="writes its adapter alone.*To resume.*AdapterTrainer"):
        trainer.train()
    expected = adapter_state(trainer.model)
    loaded = adapter_state(load_adapter(fresh(), tmp_path / "checkpoint-2"))
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_factors_over_a_4bit_base_stay_in_fp32(tmp_path: Path) -> None:
    """TRL casts all that is trained to bf16 where it sees a 4-bit model: most steps would be rounded away."""
    base = quantize_model(fresh())
    base.is_loaded_in_4bit = True  # as from_pretrained leaves it
    injected = randomize(inject(base, config(target_modules=["q_proj", "v_proj"])))
    before = adapter_state(injected)
    args = trl.SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    AdapterSFTTrainer(injected, args, train_dataset=rows(), processing_class=tokenizer())
    after = adapter_state(injected)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {parameter.dtype for parameter in injected.parameters() if parameter.requires_grad} == {torch.float32}  # fmt: skip


def test_tokens_that_a_template_would_add_are_refused(tmp_path: Path) -> None:
    args = trl.SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", chat_template_path="some/model"
    )
    with pytest.raises(ValueError, match="chat_template_path='some/model'.*clone_chat_template"):
        AdapterSFTTrainer(model(), args, train_dataset=rows(), processing_class=tokenizer())


class AdapterDPOTrainer(AdapterTrainer, trl.DPOTrainer):
    """Preferences: TRL's loss against a reference model, which is the adapter that the training starts from."""


def dpo(folder: Path, injected: nn.Module, reference: Any = None, **fields: Any) -> Any:
    pairs = [{"prompt": q, "chosen": f" {a}", "rejected": " I do not know"} for q, a in TALKS]
    settings = {
        "max_steps": 3, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 3, "learning_rate": 5e-3,
        "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_length": 48,
        "gradient_checkpointing": False, **fields,
    }  # fmt: skip
    return AdapterDPOTrainer(
        injected, trl.DPOConfig(output_dir=str(folder), **settings), ref_model=reference,
        train_dataset=datasets.Dataset.from_list(pairs), processing_class=tokenizer(),
    )  # fmt: skip


def test_preferences_are_learnt_against_the_adapter_that_a_training_starts_from(
    tmp_path: Path,
) -> None:
    """TRL alone would take the base from its name as the reference: another model, if the adapter was trained before."""
    with pytest.raises(ValueError, match="ref_model is not given.*precompute_ref_log_probs=True"):
        dpo(tmp_path / "none", model())
    computed = dpo(tmp_path / "a", model(), precompute_ref_log_probs=True)
    computed.train()
    losses = [entry["loss"] for entry in computed.history]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)  # there is no difference yet
    assert losses[-1] < losses[0] - 1e-5  # a hundred roundings of fp32: few steps on small logits
    injected = model()
    copied = dpo(tmp_path / "b", injected, copy.deepcopy(injected))
    copied.train()
    expected, found = adapter_state(copied.model), adapter_state(computed.model)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)
    shutil.rmtree(tmp_path / "a" / "checkpoint-3")
    again = dpo(tmp_path / "a", model(), precompute_ref_log_probs=True)
    again.train(resume_from_checkpoint=True)
    resumed = adapter_state(again.model)
    assert all(torch.equal(resumed[name], found[name]) for name in found)


def test_a_run_with_another_of_trls_losses_is_refused(tmp_path: Path) -> None:
    one = {"precompute_ref_log_probs": True, "max_steps": 2}
    dpo(tmp_path, model(), beta=0.1, **one).train()
    with pytest.raises(ValueError, match=r"arguments\.beta is 0\.1 there and 0\.9 here"):
        dpo(tmp_path, model(), beta=0.9, **one).train(resume_from_checkpoint=True)
    again = dpo(tmp_path, model(), beta=0.1, dataset_num_proc=1, **one)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


def test_dropout_that_trl_would_switch_off_for_good_is_refused(tmp_path: Path) -> None:
    injected = inject(fresh(), config(target_modules=["q_proj"], lora_dropout=0.1))
    with pytest.raises(ValueError, match="disable_dropout=True.*lora_dropout=0"):
        dpo(tmp_path, injected, precompute_ref_log_probs=True)
    assert next(iter(adapter_layers(injected).values())).lora_dropout.p == 0.1
