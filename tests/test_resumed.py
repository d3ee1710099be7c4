"""`lora_course.resumed`: what a run is, where it goes on and what it gives back; and saves that are whole or refused."""

import contextlib
import copy
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import AdaLoraConfig, PeftModel
from torch import nn
from transformers import (
    AriaTextConfig,
    AriaTextForCausalLM,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from lora_course import files
from lora_course.adalora import AdaLoRALinear, RankAllocator
from lora_course.arguments import training_arguments
from lora_course.checkpoint import save_adapter
from lora_course.export import export_peft, load_peft
from lora_course.folders import read_factors
from lora_course.injection import adapter_layers, inject, merge, unmerge
from lora_course.progressive import StackedLoRALinear, Stage, train_stages
from lora_course.states import adapter_state
from lora_course.training import AdapterTrainer
from tests.models import config, logits, qwen, randomize

pytestmark = pytest.mark.usefixtures("one_thread")


class Stopped(BaseException):
    """As a Ctrl-C."""


class StopAt(TrainerCallback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_) -> None:
        if state.global_step == self.step:
            self.step = None
            raise Stopped


def rows(seed: int = 1, count: int = 24, lengths: tuple[int, ...] = (12,)) -> datasets.Dataset:
    drawn = torch.Generator().manual_seed(seed)
    ids = [
        torch.randint(97, (lengths[i % len(lengths)],), generator=drawn).tolist()
        for i in range(count)
    ]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")


def made(
    folder: Path, stop: int | None = None, fields: dict[str, Any] | None = None, **given: Any
) -> AdapterTrainer:
    own = {name: given.pop(name) for name in ("auxiliary_loss", "data_collator", "eval_dataset", "optimizers") if name in given}  # fmt: skip
    callbacks = [StopAt(stop), *given.pop("callbacks", [])]
    data, kind = given.pop("data", None), given.pop("kind", AdapterTrainer)
    torch.manual_seed(5)
    model = inject(qwen(), config(**fields or {}))
    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "save_steps": 1, "bf16": False, "disable_tqdm": True}  # fmt: skip
    if callable(own.get("optimizers")):
        own["optimizers"] = own["optimizers"](model)
    args = training_arguments(folder, device="cpu", **settings | given)
    return kind(model, args, train_dataset=data or rows(), callbacks=callbacks, **own)


def run(folder: Path, stop: int | None = None, **given: Any) -> AdapterTrainer:
    trainer = made(folder, stop, **given)
    with contextlib.suppress(Stopped):
        trainer.train(resume_from_checkpoint=True)
    return trainer


def same(one: AdapterTrainer, other: AdapterTrainer) -> bool:
    a, b = adapter_state(one.model), adapter_state(other.model)
    return all(torch.equal(a[name], b[name]) for name in a)


EARLY = {
    "max_steps": 12, "eval_steps": 1, "eval_strategy": "steps", "learning_rate": 0.3, "metric_for_best_model": "eval_loss",
    "greater_is_better": False, "lr_scheduler_type": "constant", "warmup_steps": 0, "save_total_limit": None,
}  # fmt: skip


def early(folder: Path, stop: int | None = None, patience: int = 2, **given: Any) -> AdapterTrainer:
    stoppers = [EarlyStoppingCallback(patience)] if patience else []
    return run(folder, stop, callbacks=stoppers, eval_dataset=rows(9, 4), **EARLY | given)


# ------------------------------------------------------------------------------------------ resumed


def test_early_stopping_counts_on_after_a_kill(tmp_path: Path) -> None:
    whole = early(tmp_path / "a")
    steps = whole.state.global_step
    assert 2 < steps < 12
    early(tmp_path / "b", stop=steps - 1)
    resumed = early(tmp_path / "b")
    assert resumed.state.global_step == steps and same(resumed, whole)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"patience": 6}, "early_stopping_patience"),
        ({"patience": 0}, "ends"),
        ({"load_best_model_at_end": True}, "ends.best is False there and True here"),
        ({"metric_for_best_model": "eval_runtime"}, "ends.metric"),
        ({"eval_steps": 2}, "ends.evaluated"),
    ],
)
def test_a_run_that_ends_at_another_step_is_another(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    early(tmp_path)
    with pytest.raises(ValueError, match=named):
        early(tmp_path, **change)


def test_best_weights_asked_of_a_run_that_kept_the_last_are_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match="ends is None there"):
        run(tmp_path, eval_dataset=rows(9, 4), eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)  # fmt: skip


def half(features: list[dict[str, Any]]) -> dict[str, Any]:
    batch = default_data_collator(features)
    labels = batch["labels"].clone()
    labels[:, :6] = -100
    return batch | {"labels": labels}


def test_another_collator_optimiser_or_coefficient_is_another_run(tmp_path: Path) -> None:
    def adam(rate: float) -> Any:
        def make(model: nn.Module) -> Any:
            factors = [p for p in model.parameters() if p.requires_grad]
            return torch.optim.AdamW(factors, lr=rate), None

        return make

    def penalty(weight: float) -> Any:
        return lambda model: (
            weight * sum(layer.A.square().sum() for layer in adapter_layers(model).values())
        )

    for name, one, other in (
        ("data_collator", None, half),
        ("optimizers", adam(1e-2), adam(1e-4)),
        ("auxiliary_loss", penalty(0.01), penalty(10.0)),
    ):
        run(tmp_path / name, **{name: one})
        again = made(tmp_path / name, **{name: one})
        again.train(resume_from_checkpoint=True)
        again.train(resume_from_checkpoint=True)  # the same, though a scheduler changed the rate
        with pytest.raises(ValueError, match=name.removesuffix("s")):
            run(tmp_path / name, **{name: other})


def padded(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in features)
    full = {"input_ids": 0, "labels": -100}
    return {
        name: torch.stack(
            [nn.functional.pad(row[name], (0, length - len(row[name])), value=value) for row in features]
        )
        for name, value in full.items()
    }  # fmt: skip


@pytest.mark.parametrize("stop", [2, 6])
def test_rows_grouped_by_length_come_in_the_same_order_after_a_kill(
    tmp_path: Path, stop: int
) -> None:
    given = {
        "data": rows(count=10, lengths=(3, 9, 5, 7)), "data_collator": padded, "train_sampling_strategy": "group_by_length",
        "fields": {"lora_dropout": 0.1}, "max_steps": 8,
    }  # fmt: skip
    whole = run(tmp_path / "a", **given)
    run(tmp_path / "b", stop, **given)
    assert same(run(tmp_path / "b", **given), whole)


# ------------------------------------------------------------------------------------------ runs


def test_other_modules_are_another_run_and_can_be_overwritten(tmp_path: Path) -> None:
    run(tmp_path, fields={"target_modules": ["q_proj"]})
    other = {"target_modules": ["q_proj", "v_proj"]}
    with pytest.raises(ValueError, match=r"holds another run: modules\.v_proj is None there"):
        run(tmp_path, fields=other)
    trainer = made(tmp_path, fields=other)
    trainer.train(resume_from_checkpoint=True, overwrite=True)
    assert trainer.state.global_step == 6


# ------------------------------------------------------------------------------------------ trainer


@pytest.mark.parametrize("other", [["v_proj", "q_proj"], ["q_proj", ("q_proj", "v_proj")]])
def test_stages_with_other_targets_are_another_plan(tmp_path: Path, other: list[Any]) -> None:
    def plan(*targets: Any) -> list[Stage]:
        names = [[name] if isinstance(name, str) else list(name) for name in targets]
        return [Stage(r=2, target_modules=name, steps=1) for name in names]

    given = {"per_device_train_batch_size": 4, "disable_tqdm": True, "device": "cpu", "bf16": False}
    train_stages(qwen(), plan("q_proj", "v_proj"), rows(), tmp_path, **given)
    with pytest.raises(ValueError, match=r"stages\.\d\.target_modules is \['"):
        train_stages(qwen(), plan(*other), rows(), tmp_path, **given)


# ------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("training", [True, False])
def test_training_and_evaluation_leave_each_modules_mode(tmp_path: Path, training: bool) -> None:
    trainer = made(tmp_path, eval_dataset=rows(9, 4), fields={"lora_dropout": 0.5})
    trainer.model.train(training)
    trainer.model.model.layers[0].train(not training)
    modes = [module.training for module in trainer.model.modules()]
    trainer.evaluate()
    trainer.train()
    assert modes == [module.training for module in trainer.model.modules()]


class Mean(Trainer):
    """A Trainer whose loss is a mean, and says so."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class AdapterMean(AdapterTrainer, Mean):
    pass


def test_an_auxiliary_loss_counts_once_beside_a_loss_that_says_it_is_a_mean(tmp_path: Path) -> None:
    def penalty(model: nn.Module) -> torch.Tensor:
        return sum(layer.A.square().sum() for layer in adapter_layers(model).values())

    losses = []
    for accumulation in (1, 4):
        trainer = made(
            tmp_path / str(accumulation), kind=AdapterMean, auxiliary_loss=penalty, max_steps=1,
            per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        losses.append(trainer.history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_interrupted_before_a_checkpoint_the_same_call_starts_from_the_same_adapter(
    tmp_path: Path,
) -> None:
    whole = run(tmp_path / "a", save_steps=100)
    trainer = run(tmp_path / "b", stop=4, save_steps=100)
    assert trainer.state.global_step == 4
    trainer.train(resume_from_checkpoint=True)
    assert same(trainer, whole)


def test_a_repeated_run_returns_what_the_first_one_did(tmp_path: Path) -> None:
    first = made(tmp_path, logging_steps=4).train(resume_from_checkpoint=True)
    assert made(tmp_path, logging_steps=4).train(resume_from_checkpoint=True) == first


def test_a_compiled_model_is_refused_with_the_way_to_compile(tmp_path: Path) -> None:
    model = torch.compile(inject(qwen(), config()), backend="eager")
    args = training_arguments(tmp_path, device="cpu", bf16=False)
    with pytest.raises(ValueError, match="torch_compile=True"):
        AdapterTrainer(model, args, train_dataset=rows())


# ------------------------------------------------------------------------------------------ allocator


def test_a_second_schedule_on_one_adapter_is_refused_before_a_step(tmp_path: Path) -> None:
    fields = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 6}
    model = inject(qwen(), AdaLoraConfig(**fields, target_modules=["q_proj"]), AdaLoRALinear)
    args = training_arguments(tmp_path, device="cpu", bf16=False, max_steps=6, save_strategy="no", disable_tqdm=True)  # fmt: skip
    trainer = AdapterTrainer(model, args, train_dataset=rows(), callbacks=[RankAllocator(model)])
    trainer.train()
    before = adapter_state(model)
    with pytest.raises(RuntimeError, match="injected anew"):
        trainer.train()
    assert all(torch.equal(before[name], found) for name, found in adapter_state(model).items())


# ------------------------------------------------------------------------------------------ layer


def test_what_is_given_back_is_the_base_that_was_merged_into_last() -> None:
    model, other = (
        randomize(inject(qwen(seed), config(), StackedLoRALinear, keep_original=True))
        for seed in (0, 7)
    )
    unmerge(merge(model))
    model.load_state_dict(other.state_dict())
    before = logits(model)
    unmerge(merge(model))
    assert torch.equal(logits(model), before)


# ------------------------------------------------------------------------------------------ injection


def test_an_adapter_is_not_taken_from_a_merged_models_state_without_its_base() -> None:
    model = randomize(inject(qwen(), config()))
    state = copy.deepcopy(model.state_dict())
    plain = {name: value for name, value in state.items() if "base_layer" not in name}
    inject(qwen(), config()).load_state_dict(plain, strict=False)
    merge(model)
    torn = {name: value for name, value in model.state_dict().items() if "base_layer" not in name}
    with pytest.raises(RuntimeError, match="is merged, and this state_dict lacks the base weight"):
        inject(qwen(), config()).load_state_dict(torn, strict=False)
    with pytest.raises(RuntimeError, match="is merged"):
        copy.deepcopy(model).load_state_dict(plain, strict=False)
    model.load_state_dict(state)
    assert not any(layer.merged for layer in adapter_layers(model).values())


# ------------------------------------------------------------------------------------------ export


def test_a_killed_export_leaves_the_old_adapter_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = randomize(inject(qwen(), config(lora_alpha=12)))
    new = randomize(inject(qwen(), config(lora_alpha=48)), seed=2)
    replace = os.replace
    for at in ("adapter_model.safetensors", "adapter_config.json"):
        export_peft(old, tmp_path)
        with monkeypatch.context() as patch:

            def killed(source: Any, target: Any, at: str = at) -> None:
                if Path(target).name == at:
                    raise KeyboardInterrupt
                replace(source, target)

            patch.setattr(files.os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                export_peft(new, tmp_path)
        with pytest.raises(ValueError, match="adapter_config"):
            PeftModel.from_pretrained(qwen(), tmp_path)
        with pytest.raises(FileNotFoundError, match="adapter_config"):
            load_peft(qwen(), tmp_path)
    export_peft(new, tmp_path)
    assert torch.equal(logits(load_peft(qwen(), tmp_path)), logits(new))


# ------------------------------------------------------------------------------------------ folders


def test_a_folder_with_an_adapter_and_an_older_export_is_refused(tmp_path: Path) -> None:
    model = randomize(inject(qwen(), config()))
    export_peft(model, save_adapter(model, tmp_path))
    read_factors(tmp_path)
    save_adapter(randomize(model, seed=2), tmp_path)
    with pytest.raises(ValueError, match="two adapters that differ"):
        read_factors(tmp_path)


def test_factors_of_another_rank_than_the_configuration_says_are_refused(tmp_path: Path) -> None:
    export_peft(randomize(inject(qwen(), config(r=3))), tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(text.replace('"r": 3', '"r": 6'))
    with pytest.raises(ValueError, match=r"rank \[3\], and adapter_config.json says 6"):
        read_factors(tmp_path)


# ------------------------------------------------------------------------------------------ files


def test_only_what_a_killed_writer_left_is_tidied_up(tmp_path: Path) -> None:
    (tmp_path / "notes.unfinished").write_text("mine")
    left = tmp_path / f"adapter.json.{'0' * 32}.unfinished"
    left.write_text("torn")
    with files.writing(tmp_path):
        pass
    assert (tmp_path / "notes.unfinished").exists() and not left.exists()


def test_a_broken_link_or_a_file_above_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    for name in ("link", "file", "file/below"):
        with pytest.raises(ValueError, match="can't be a folder"):
            files.make_folder(tmp_path / name)


# ------------------------------------------------------------------------------------------ targets


def test_fused_experts_under_other_names_are_seen() -> None:
    fields = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    aria = AriaTextForCausalLM(
        AriaTextConfig(**fields, moe_num_experts=4, moe_topk=2, pad_token_id=0)
    )
    with pytest.raises(TypeError, match=r"experts\.gate_up_proj.*several experts"):
        inject(aria, config())

    class Rows(nn.Module):  # as in DBRX: `[experts · width, in]`
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.zeros(64, 48))

    model = qwen()
    model.model.layers[0].mlp.experts = nn.ModuleDict({"mlp": Rows()})
    with pytest.raises(TypeError, match=r"experts\.mlp\.w1.*several experts"):
        inject(model, config())
