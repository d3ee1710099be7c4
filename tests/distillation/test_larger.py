"""`distillation.larger`: a model of its own as the teacher, whatever its width, mode and place."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from lora_course.arguments import training_arguments
from lora_course.distillation import (
    DistillationConfig,
    DistillationTrainer,
    TeacherModel,
    distill,
    distillation_step,
)
from lora_course.injection import adapter_layers
from lora_course.states import adapter_state
from tests.distillation.models import adapted, rows, student
from tests.models import SHAPE

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 95
"""Of the tokenizer; the student's logits are 97 wide, the teacher's 101."""


def large(seed: int = 0) -> nn.Module:
    """A wider and deeper model than the student, with an adapter whose dropout would show."""
    torch.manual_seed(seed)
    shape = SHAPE | {"vocab_size": 101, "hidden_size": 64, "num_hidden_layers": 3}
    base = Qwen2ForCausalLM(Qwen2Config(**shape))
    base.lm_head.weight.data *= 20  # a teacher that says something
    return adapted(2, base, r=4, lora_dropout=0.3).train()


def batch() -> dict[str, torch.Tensor]:
    """Three rows with 3, 2 and 1 labels less than tokens; no label is beyond the tokenizer's tokens."""
    found = rows(6)[3:6]
    found.pop("domain")
    for key in ("input_ids", "labels"):
        found[key] = found[key].clamp(max=TOKENS - 1)
    return found


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_the_loss_is_that_of_both_models_over_the_tokens_that_both_have(alpha: float) -> None:
    model, teacher = student(), large()
    config = DistillationConfig(alpha=alpha, temperature=2.0)
    found = distillation_step(TeacherModel(model, teacher, TOKENS), batch(), config)

    given = batch()
    keep, y = given["labels"][:, 1:] != -100, given["labels"][:, 1:]
    with torch.no_grad():
        told = teacher.eval()(given["input_ids"]).logits[:, :-1][keep][:, :TOKENS]
    said = model(given["input_ids"]).logits[:, :-1][keep][:, :TOKENS]
    kl = F.kl_div(
        (said / 2).log_softmax(-1), (told / 2).log_softmax(-1), log_target=True, reduction="none"
    )
    expected = (1 - alpha) * F.cross_entropy(said, y[keep]) + alpha * 4 * kl.sum(-1).mean()
    assert found.divergence > 0.1
    torch.testing.assert_close(found.loss, expected)


def test_a_student_comes_nearer_and_the_teacher_keeps_every_bit() -> None:
    model, teacher = student(), large()
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad], lr=1e-2
    )
    taught = TeacherModel(model, teacher, TOKENS)
    history = distill(taught, [batch()] * 20, optimizer, DistillationConfig(alpha=1.0))
    assert history[-1]["divergence"] < 0.9 * history[0]["divergence"]
    assert all(torch.equal(before[name], weight) for name, weight in teacher.state_dict().items())
    assert not any(layer.A.grad is not None for layer in adapter_layers(teacher).values())


def trainer(folder: Path, teacher: nn.Module, steps: int) -> DistillationTrainer:
    model = student()
    how = training_arguments(
        folder, device="cpu", bf16=False, max_steps=steps, per_device_train_batch_size=2, learning_rate=5e-3,
        save_steps=2, disable_tqdm=True, lr_scheduler_type="constant", warmup_steps=0,
    )  # fmt: skip
    taught = TeacherModel(model, teacher, 97)
    return DistillationTrainer(model, how, teachers=taught, train_dataset=rows())


def test_a_run_goes_on_with_the_same_teacher_and_with_no_other(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", large(), 4)
    whole.train()
    trainer(tmp_path / "cut", large(), 4).train()
    (tmp_path / "cut" / "checkpoint-4").rename(tmp_path / "gone")
    resumed = trainer(tmp_path / "cut", large(), 4)
    resumed.train(resume_from_checkpoint=True)
    ended = adapter_state(whole.model)
    for name, tensor in adapter_state(resumed.model).items():
        torch.testing.assert_close(tensor, ended[name], rtol=0, atol=0)
    another = large()
    next(iter(adapter_layers(another).values())).B.data += 0.01
    with pytest.raises(ValueError, match="teachers"):
        trainer(tmp_path / "cut", another, 4).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("teacher", "tokens", "message"),
    [
        (None, 97, "The teacher is the student itself"),
        (large(), 99, "The student has logits for 97 tokens and the tokenizer has 99"),
        (student(), 101, "The student has logits for 97"),
    ],
)
def test_what_cannot_teach_is_refused(teacher: nn.Module | None, tokens: int, message: str) -> None:
    model = student()
    with pytest.raises(ValueError, match=message):
        TeacherModel(model, model if teacher is None else teacher, tokens)
