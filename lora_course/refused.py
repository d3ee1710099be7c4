"""What `AdapterTrainer` does not train with, said before any work is done, and what it says of a training that taught nothing."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from transformers import TrainerState, TrainingArguments, default_data_collator

from lora_course.injection import adapter_layers, trained_besides
from lora_course.runs import sample_of
from lora_course.targets import input_embedding, output_head

IGNORED = -100
"""The label of a token that does not count."""
FIELDS = {
    "push_to_hub": "checkpoints are in the course's own format: call export_peft(model, folder) and upload that folder",
    "auto_find_batch_size": "it would go on with weights that the batch that was too large has trained already, and as another run: "
    "find a batch size that fits, and set per_device_train_batch_size",
    "bf16_full_eval": "evaluation would round the base and the adapter to it for good: bf16=True evaluates in bf16 too",
    "fp16_full_eval": "evaluation would round the base and the adapter to it for good: fp16=True evaluates in fp16 too",
}  # fmt: skip
"""Fields of `TrainingArguments` that are refused, and why."""
GIVEN = {
    "model_init": "a model that a Trainer makes for itself is in nobody's hands: give the injected model, and a trainer to each of several rates",
    "peft_config": "the model carries its adapter already, and PEFT would freeze it: leave it out",
}  # fmt: skip
"""Arguments of other Trainers that are refused, and why."""


def check_given(model: nn.Module, args: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Raise ValueError for a field of the arguments, or another argument, with which the training would be another than asked for."""
    for name, reason in FIELDS.items():
        if getattr(args, name, None):
            raise ValueError(f"{name}={getattr(args, name)!r}: {reason}.")
    if isinstance(model, OptimizedModule):
        raise ValueError(
            "The model is what torch.compile gave: give the model itself, and torch_compile=True in the arguments."
        )
    for name, reason in GIVEN.items():
        if given.get(name) is not None:
            raise ValueError(f"{name} is given: {reason}.")
    template = getattr(args, "chat_template_path", None)
    if template and not str(template).endswith((".jinja", ".j2")):
        raise ValueError(
            f"chat_template_path={template!r} adds tokens to the model, which this adapter neither trains nor saves: call "
            "trl.clone_chat_template before inject, or give the template's .jinja file."
        )
    dropouts = [layer.lora_dropout for layer in adapter_layers(model).values()]
    if getattr(args, "disable_dropout", False) and any(getattr(d, "p", 0) for d in dropouts):
        raise ValueError(
            "disable_dropout=True would set the adapter's dropout to 0 for good: inject with lora_dropout=0, or set disable_dropout=False."
        )
    if not getattr(args, "precompute_ref_log_probs", True) and given.get("ref_model") is None:
        raise ValueError(
            "ref_model is not given: TRL would load the base anew from its name, without the adapter that the training starts from. "
            "Set precompute_ref_log_probs=True (the model as it is now, at no memory), or give ref_model=copy.deepcopy(model)."
        )


def check_adapter(model: nn.Module) -> None:
    """Raise ValueError unless the model's adapter can be trained: injected, not merged, here, in fp32, not frozen."""
    for name, layer in adapter_layers(model).items():
        if layer.merged:
            raise ValueError(
                f"{name!r} is merged, so its factors would get no gradient: call unmerge(model) before training"
            )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError(
            "No parameter of this model requires a gradient (inference_mode=True, or a tool has frozen all since?): inject with "
            "inference_mode=False, after tools such as prepare_model_for_kbit_training, to train."
        )
    if others := trained_besides(model):
        raise ValueError(
            f"{others[0]!r} ({len(others)} in all) requires a gradient and is no part of the adapter: checkpoints would not hold it. Freeze "
            "it, or name its layer in target_modules; embeddings of new tokens are trained before inject, or with PEFT."
        )
    for name, parameter in trained.items():
        if parameter.is_meta:
            raise ValueError(
                f"{name!r} is offloaded, and can't be trained there: let accelerate dispatch the base first, and inject then."
            )
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name!r} is {parameter.dtype}, which rounds most steps of a training away: cast the base before inject "
                "(factors stay in fp32 beside it), or give them back by parameter.data = parameter.data.float()."
            )


def check_rows(
    rows: Any, model: nn.Module, batch_size: int, collator: Callable[..., Any] | None
) -> None:
    """Look at a sample of tokenised rows; those of other kinds pass. collator: what makes a batch of them; None is Trainer's own.

    Raises:
        ValueError: no row at all, an empty one, a token that the model does not have, no label that counts, rows of several
        lengths where nothing pads them.

    Warns:
        UserWarning: a row that is longer than the positions that the model was made for.
    """
    if hasattr(rows, "__len__") and not len(rows):
        raise ValueError("train_dataset has no rows.")
    found = [row for row in sample_of(rows) if isinstance(row, Mapping) and "input_ids" in row]
    ids = [row for row in (_vector(row["input_ids"]) for row in found) if row is not None]
    if not found or len(ids) < len(found):
        return
    if any(not row.numel() for row in ids):
        raise ValueError("train_dataset has a row without tokens: leave such rows out.")
    tokens = getattr(input_embedding(model), "num_embeddings", None)
    lowest, highest = min(int(row.min()) for row in ids), max(int(row.max()) for row in ids)
    if lowest < 0 or (tokens is not None and highest >= tokens):
        raise ValueError(
            f"train_dataset holds the token {lowest if lowest < 0 else highest}, and the model's are 0 to {tokens and tokens - 1}: use the "
            "model's own tokenizer, or resize_token_embeddings before inject."
        )
    config: Any = getattr(model, "config", None)
    first = 0 if getattr(config, "is_encoder_decoder", False) else 1  # the first has none before it
    if all("labels" in row for row in found) and not any(_counts(row, first) for row in found):
        raise ValueError(
            f"No label counts in {len(found)} rows of train_dataset (all are {IGNORED}, or there is no token before them): "
            "is the answer cut off, or the chat template without {% generation %}?"
        )
    lengths = {len(row) for row in ids}
    if len(lengths) > 1 and batch_size > 1 and collator in (None, default_data_collator):
        raise ValueError(
            f"Rows have {min(lengths)} to {max(lengths)} tokens, and nothing pads them: give data_collator="
            "transformers.DataCollatorForSeq2Seq(tokenizer), which pads labels too."
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    if positions and max(lengths) > positions:
        warnings.warn(
            f"A row has {max(lengths)} tokens, and the model was made for {positions}: cut rows to that, or it learns where it is lost.",
            stacklevel=3,
        )


def check_made(trainer: Any, given: Mapping[str, Any], forward: object) -> None:
    """Raise ValueError where a Trainer, once made, would train another model than the injected one, or save the base.

    given: the arguments that it was made with.
    forward: what it set on the model: TRL's fused head, which does not see an adapter on the output embeddings.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "AdapterTrainer does not train under FSDP or DeepSpeed, whose checkpoints hold the base: launch without it (each process "
            "holds the base then), or call fully_shard and save_adapter in a loop of your own."
        )
    head = output_head(trainer.model) if forward is not None else None
    for name, layer in adapter_layers(trainer.model).items():
        if layer is head:
            raise ValueError(
                f"{name!r} has an adapter, and this Trainer computes its loss from the head's plain weight (TRL's fused head does): "
                "leave it out of target_modules, or train with AdapterTrainer without TRL"
            )
    if getattr(trainer, "ref_model", None) is not None and given.get("ref_model") is None:
        raise ValueError(
            "This Trainer has loaded a reference model by the base's name, without the adapter that the training starts from: "
            "give ref_model=copy.deepcopy(model), or settings that need none."
        )


def check_number(found: Any) -> Tensor:
    """`found`, an auxiliary loss. Raises TypeError unless it is a tensor with one number."""
    if not isinstance(found, Tensor) or found.numel() != 1:
        shape = list(found.shape) if isinstance(found, Tensor) else found
        raise TypeError(
            f"auxiliary_loss gave a {type(found).__name__} ({shape}): a tensor with one number, and its gradient, is expected."
        )
    return found


def warn_of_no_labels(passes: Any) -> int:
    """Warn where a training made forward passes of steps without a label that counts. Returns 0, their number from now on."""
    if int(passes):
        warnings.warn(
            f"{int(passes)} forward passes were of steps without a token whose label counts, and taught nothing.",
            stacklevel=4,
        )
    return 0


def warn_of_no_best(args: TrainingArguments, state: TrainerState) -> None:
    """Warn where a training was to end with its best weights, and no evaluation gave a number."""
    if args.load_best_model_at_end and state.best_metric in (None, math.inf, -math.inf):
        warnings.warn(
            f"No evaluation gave a number for {args.metric_for_best_model}: these are the last weights, not the best.",
            stacklevel=4,
        )


def _counts(row: Mapping[str, Any], first: int) -> bool:
    """Whether a label of the row counts, from the place `first` on; one label for the whole row does."""
    labels = _vector(row["labels"])
    return labels is None or bool((labels[first:] != IGNORED).any())


def _vector(value: Any) -> Tensor | None:
    """A row's numbers as a vector of whole ones; None where it holds something else."""
    if isinstance(value, list | tuple) and all(isinstance(number, numbers.Integral) for number in value):  # fmt: skip
        return torch.tensor(value, dtype=torch.long)
    return torch.as_tensor(value) if getattr(value, "ndim", None) == 1 else None
