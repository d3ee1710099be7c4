"""Distillation: several LoRA teachers on one shared base, one LoRA student on the same base.

    L = (1 − α) · CE(y, softmax(z)) + α · T² · KL(p̄ ‖ q),     p̄ = Σₖ wₖ softmax(zₖ / T),     q = softmax(z / T)

a mean over the tokens that have a label; z `[B, T, V]` are the student's logits, zₖ the k-th teacher's, wₖ ≥ 0, Σₖ wₖ = 1.
The gradient with respect to z is α · T · (q − p̄) of a token, and q − p̄ shrinks as 1/T: the factor T² keeps the term's size.

Sources: Hinton et al., arXiv 1503.02531; reverse KL, MiniLLM, arXiv 2306.08543 (there over text that the student writes,
here over given text); a LoRA student, KD-LoRA, arXiv 2410.20777.

Teachers are adapters, so N of them cost one base and N adapters. `Teachers` exchanges whole layers for the time of a
teacher's forward pass: the student's own layers are set aside, and come back as the same objects with the same bits.
`TeacherModel` is the other case: one teacher that is a model of its own.
"""

from lora_course.distillation.larger import TeacherModel
from lora_course.distillation.loss import (
    IGNORED,
    DistillationConfig,
    DistillationLoss,
    add_teacher,
    distillation_loss,
    loss_from_mixture,
    mixture_log_probs,
)
from lora_course.distillation.teachers import DOMAIN, Teachers, standing_in
from lora_course.distillation.trainer import DistillationTrainer, distill, distillation_step

__all__ = [
    "DOMAIN",
    "DistillationConfig",
    "DistillationLoss",
    "DistillationTrainer",
    "IGNORED",
    "TeacherModel",
    "Teachers",
    "add_teacher",
    "distill",
    "distillation_loss",
    "distillation_step",
    "loss_from_mixture",
    "mixture_log_probs",
    "standing_in",
]
