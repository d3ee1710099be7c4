"""A teacher that is another model, such as a larger one: it has weights of its own, and the student's tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_course.arguments import device_of
from lora_course.distillation.loss import DistillationConfig, counted_logits, mixture_log_probs
from lora_course.distillation.teachers import split_batch


class TeacherModel:
    """A whole model as the one teacher of `model`, whose adapter is the student; to be given where `Teachers` are.

    Both read the same token ids. Models of one family often pad their logits to widths of their own: columns beyond the
    tokenizer's last token count for neither.

    Args:
        model: the student.
        teacher: a causal language model, also with an adapter, in 4 bits or spread over several devices. It is put into
            eval mode and gets no gradient.
        tokens: of the tokenizer, `len(tokenizer)`.

    Attributes:
        weights: `[1]`, as of one of the `Teachers`.

    Raises:
        ValueError: the teacher is the student, or one of both has fewer logits than the tokenizer has tokens.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, tokens: int) -> None:
        if teacher is model:
            raise ValueError(
                "The teacher is the student itself, which has nothing to learn from it: load another model, or give adapters "
                "of this one to Teachers."
            )
        for name, own in (("student", model), ("teacher", teacher)):
            config: Any = own.config
            if (width := config.get_text_config().vocab_size) < tokens:
                raise ValueError(
                    f"The {name} has logits for {width} tokens and the tokenizer has {tokens}: both models need this tokenizer, "
                    "and tokens=len(tokenizer)."
                )
        self.model, self.teacher, self.tokens = model, teacher, tokens
        self.weights = torch.ones(1, dtype=torch.float64)

    @torch.no_grad()
    def log_probs(self, inputs: Mapping[str, Any], config: DistillationConfig) -> Tensor:
        """log p `[N, tokens]` of the N tokens of a batch whose label counts; inputs: as for `Teachers.log_probs`."""
        inputs, labels, _ = split_batch(inputs)
        device = device_of(self.teacher)
        moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}
        logits = self.teacher.eval()(**moved, use_cache=False).logits
        target = mixture_log_probs([counted_logits(logits, labels)[:, : self.tokens]], None, config)
        return target.to(labels.device)

    def fingerprint(self) -> str:
        """A hash of `tokens` and of a sample of every weight of the teacher."""
        digest = hashlib.sha256(str(self.tokens).encode())
        for name, weight in self.teacher.named_parameters():
            digest.update(name.encode())
            if not weight.is_meta:  # offloaded
                sample = weight.detach().flatten()[:: max(1, weight.numel() // 64)]
                digest.update(sample.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]
