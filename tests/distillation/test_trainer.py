"""`distillation.trainer`: the trainer against a loop by hand, however batches are cut, resumed, refused."""

from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback

from lora_course.arguments import training_arguments
from lora_course.distillation import (
    DistillationConfig,
    DistillationTrainer,
    Teachers,
    distill,
    distillation_step,
)
from lora_course.injection import adapter_layers
from lora_course.runs import read_mark
from lora_course.states import adapter_state
from lora_course.training import AdapterTrainer
from tests.distillation.models import adapted, rows, student

pytestmark = pytest.mark.usefixtures("one_thread")


def arguments(folder: Path, **overrides: object):
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "save_strategy": "no", "bf16": False,
        "disable_tqdm": True, "max_grad_norm": 0, **overrides,
    }  # fmt: skip
    return training_arguments(folder, device="cpu", **settings)


STATES = {"a": adapter_state(adapted(2, r=4)), "b": adapter_state(adapted(3, r=5))}
BY_DOMAIN = [[1.0, 0.0], [0.3, 0.7]]
SETTINGS = DistillationConfig(alpha=0.6, temperature=2.0)


def trainer_of(
    folder: Path, model: nn.Module | None = None, **overrides: object
) -> DistillationTrainer:
    own = {
        key: overrides.pop(key)
        for key in ("auxiliary_loss", "callbacks", "eval_dataset", "train_dataset")
        if key in overrides
    }
    settings, weights = overrides.pop("config", SETTINGS), overrides.pop("weights", BY_DOMAIN)
    model = student(lora_dropout=0.1) if model is None else model
    teachers = Teachers(model, overrides.pop("states", STATES), weights)
    return DistillationTrainer(
        model,
        arguments(folder, **overrides),
        teachers=teachers,
        config=settings,
        **{"train_dataset": rows()} | own,
    )


def penalty(model: nn.Module) -> torch.Tensor:
    return 0.3 * sum((layer.A**2).sum() for layer in adapter_layers(model).values())


def assert_same(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0
) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("accumulation", "auxiliary"), [(1, None), (3, None), (3, penalty)])
def test_training_equals_a_loop_by_hand(tmp_path: Path, accumulation: int, auxiliary) -> None:
    model = student()
    trainer = trainer_of(
        tmp_path, model, gradient_accumulation_steps=accumulation, lr_scheduler_type="constant", warmup_steps=0,
        weight_decay=0.1, learning_rate=1e-3, auxiliary_loss=auxiliary,
    )  # fmt: skip
    batches = [dict(part) for part in trainer.get_train_dataloader()]
    trainer.train()

    reference = student().train()
    teachers = [adapted(2, r=4), adapted(3, r=5)]
    parameters = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
    history = []
    for step in range(4):
        micro = batches[step * accumulation : (step + 1) * accumulation]
        tokens = sum((part["labels"][:, 1:] != -100).sum() for part in micro)
        total = torch.zeros(())
        for part in micro:
            ids, labels, domain = part["input_ids"], part["labels"], part["domain"]
            z = reference(input_ids=ids).logits
            for row in range(len(ids)):
                with torch.no_grad():
                    p = sum(
                        w * F.softmax(t(input_ids=ids[row, None]).logits[0] / 2, -1)
                        for w, t in zip(BY_DOMAIN[domain[row]], teachers, strict=True)
                    )
                for t in range(1, ids.shape[1]):
                    if labels[row, t] != -100:
                        kl = F.kl_div(
                            F.log_softmax(z[row, t - 1] / 2, -1), p[t - 1], reduction="sum"
                        )
                        total = (
                            total
                            + (0.4 * F.cross_entropy(z[row, t - 1], labels[row, t]) + 0.6 * 4 * kl)
                            / tokens
                        )
        total = total + (auxiliary(reference) if auxiliary else 0)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
    # Adam divides by the gradient's own size, which amplifies the last bits of small gradients.
    assert_same(adapter_state(model), adapter_state(reference), 1e-5)
    assert [entry["loss"] for entry in trainer.history] == pytest.approx(history, abs=1e-4)


def test_however_the_batch_is_cut_the_step_is_the_same(tmp_path: Path) -> None:
    states, histories = [], []
    for size, accumulation in [(8, 1), (2, 4)]:
        model = student()
        trainer = trainer_of(
            tmp_path,
            model,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            auxiliary_loss=penalty,
        )
        trainer.train()
        states.append(adapter_state(model))
        histories.append(trainer.history)
    assert_same(*states, tolerance=2e-5)
    for one, other in zip(*histories, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
        assert {"divergence", "task"} < set(one)
    plain = [entry["loss"] for entry in trainer_history(tmp_path, SETTINGS)]
    for entry, without in zip(histories[0][:1], plain[:1], strict=True):
        assert without == pytest.approx(
            0.4 * entry["task"] + 0.6 * 4 * entry["divergence"], rel=1e-4
        )


def trainer_history(folder: Path, settings: DistillationConfig) -> list[dict[str, float]]:
    trainer = trainer_of(folder, student(), per_device_train_batch_size=8, config=settings)
    trainer.train()
    return trainer.history


def test_without_the_teachers_share_it_is_adapter_trainer_dropout_and_all(tmp_path: Path) -> None:
    model, plain = student(lora_dropout=0.3), student(lora_dropout=0.3)
    trainer_of(tmp_path, model, config=DistillationConfig(alpha=0.0)).train()
    AdapterTrainer(plain, arguments(tmp_path), train_dataset=rows()).train()
    assert_same(adapter_state(model), adapter_state(plain), 1e-6)


def test_the_loop_and_the_trainer_agree(tmp_path: Path) -> None:
    one, other = student(), student()
    trainer = trainer_of(
        tmp_path, one, lr_scheduler_type="constant", warmup_steps=0, learning_rate=1e-3
    )
    batches = list(trainer.get_train_dataloader())[:4]
    trainer.train()
    optimizer = torch.optim.AdamW(
        [p for p in other.parameters() if p.requires_grad], lr=1e-3, weight_decay=0
    )
    history = distill(Teachers(other, STATES, BY_DOMAIN), batches, optimizer, SETTINGS)
    assert_same(adapter_state(one), adapter_state(other), 1e-6)
    assert [entry["loss"] for entry in trainer.history] == pytest.approx(
        [entry["loss"] for entry in history], abs=1e-4
    )


def test_evaluation_gives_the_loss_without_dropout(tmp_path: Path) -> None:
    model = student(lora_dropout=0.3)
    trainer = trainer_of(tmp_path, model, eval_dataset=rows(6), per_device_eval_batch_size=6)
    metrics = trainer.evaluate()
    model.train()
    dropping = distillation_step(trainer.teachers, rows(6)[:], SETTINGS).loss.item()
    assert abs(metrics["eval_loss"] - dropping) > 1e-4
    model.eval()
    expected = distillation_step(trainer.teachers, rows(6)[:], SETTINGS)
    assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 3


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = trainer_of(tmp_path / "whole", **saving)
    whole.train()
    trainer_of(tmp_path / "cut", callbacks=[Stop()], **saving).train()
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    assert {path.name for path in checkpoint.iterdir()} >= {"adapter.safetensors", "optimizer.pt"}
    assert (checkpoint / "adapter.safetensors").stat().st_size < 1.2 * sum(
        t.nbytes for t in adapter_state(whole.model).values()
    ) + 8192
    resumed = trainer_of(tmp_path / "cut", **saving)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_same(adapter_state(resumed.model), adapter_state(whole.model))
    assert resumed.history == whole.history


def test_numbers_of_numpy_are_taken_and_its_own_loss_is_no_callers(tmp_path: Path) -> None:
    config = DistillationConfig(alpha=numpy.float32(0.5), temperature=numpy.float32(2))
    trainer = trainer_of(tmp_path, config=config, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    run = read_mark(tmp_path / "checkpoint-1")["run"]
    assert run["method"]["distillation"] | {"alpha": 0.5, "temperature": 2.0} == run["method"]["distillation"]  # fmt: skip
    assert run["compute_loss_func"] is None


def test_another_loss_or_model_is_refused(tmp_path: Path) -> None:
    model = student()
    teachers = Teachers(model, STATES)
    with pytest.raises(ValueError, match="another model"):
        DistillationTrainer(student(), arguments(tmp_path), teachers=teachers, train_dataset=rows())
    with pytest.raises(ValueError, match="another loss"):
        DistillationTrainer(
            model,
            arguments(tmp_path, label_smoothing_factor=0.1),
            teachers=teachers,
            train_dataset=rows(),
        )
