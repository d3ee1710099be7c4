"""`lora_course.runs`: what is resumed is what was asked for."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, TrainerCallback

from lora_course.arguments import training_arguments
from lora_course.descriptions import UNKNOWN
from lora_course.files import read_json
from lora_course.injection import adapter_layers, inject
from lora_course.runs import COMPLETE, fingerprint, name_of, read_mark, rotate_checkpoints
from lora_course.states import adapter_state
from lora_course.training import AdapterTrainer
from tests.models import qwen, randomize


def injected(**fields: Any) -> nn.Module:
    torch.manual_seed(5)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **fields}
    return randomize(inject(qwen(), LoraConfig(**settings)))


def rows(seed: int = 1, count: int = 12) -> datasets.Dataset:
    ids = torch.randint(1, 97, (count, 8), generator=torch.Generator().manual_seed(seed))
    return datasets.Dataset.from_dict({"input_ids": ids.numpy(), "labels": ids.numpy()})


def penalty(model: nn.Module, weight: float = 1.0) -> Tensor:
    return weight * sum(layer.B.square().sum() for layer in adapter_layers(model).values())


def doubled(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logs = outputs.logits[:, :-1].flatten(0, 1)
    return 2 * nn.functional.cross_entropy(logs, labels[:, 1:].flatten())


class Aux:
    def __call__(self, model: nn.Module) -> Tensor:
        return penalty(model)


def run(
    folder: Path,
    *,
    data: datasets.Dataset | None = None,
    auxiliary: Callable[[nn.Module], Tensor] | None = None,
    overwrite: bool = False,
    trainer: dict[str, Any] | None = None,
    fields: dict[str, Any] | None = None,
    **overrides: Any,
) -> tuple[AdapterTrainer, dict[str, Tensor]]:
    settings = {"max_steps": 4, "save_steps": 2, "learning_rate": 5e-3, "bf16": False, **overrides}
    settings |= {"per_device_train_batch_size": 2, "disable_tqdm": True, "report_to": "none"}
    arguments = training_arguments(folder, device="cpu", **settings)
    made = AdapterTrainer(
        injected(**fields or {}),
        arguments,
        train_dataset=rows() if data is None else data,
        auxiliary_loss=auxiliary,
        **trainer or {},
    )
    made.train(resume_from_checkpoint=True, overwrite=overwrite)
    return made, adapter_state(made.model)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fields": {"r": 5}}, r"config\.r is 3 there and 5 here"),
        ({"fields": {"lora_alpha": 7}}, r"config\.lora_alpha is 6 there and 7 here"),
        ({"fields": {"use_rslora": True}}, r"use_rslora is False there and True here"),
        ({"learning_rate": 1e-3}, r"learning_rate is 0\.005 there and 0\.001 here"),
        ({"max_steps": 6}, r"length is '4 steps' there and '6 steps' here"),
        ({"gradient_accumulation_steps": 2}, r"rows_a_step is 2 there and 4 here"),
        ({"seed": 3}, r"seed is 0 there and 3 here"),
        ({"data": rows(seed=2)}, r"rows is '\w+' there and '\w+' here"),
        ({"auxiliary": penalty}, r"auxiliary_loss is None there and 'penalty' here"),
        ({"auxiliary": Aux()}, r"auxiliary_loss is None there and 'Aux' here"),
        (
            {"trainer": {"compute_loss_func": doubled}},
            r"compute_loss_func is None .* 'doubled' here",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_run_in_the_folder_is_refused_by_name_and_can_be_overwritten(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    run(tmp_path / "a")
    with pytest.raises(ValueError, match=named) as caught:
        run(tmp_path / "a", **change)
    assert "overwrite=True" in str(caught.value) and "another folder" in str(caught.value)
    _, fresh = run(tmp_path / "b", **change)
    _, anew = run(tmp_path / "a", overwrite=True, **change)
    assert all(torch.equal(anew[name], fresh[name]) for name in fresh)


def test_overwriting_deletes_another_runs_checkpoints_without_resuming_too(tmp_path: Path) -> None:
    run(tmp_path, max_steps=6)
    made, _ = run(tmp_path / "else")
    made.args.output_dir = str(tmp_path)
    made.train(overwrite=True)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    kept = (tmp_path / "checkpoint-2" / "adapter.safetensors").stat().st_mtime_ns
    made.train(overwrite=True)  # of the same run nothing is deleted, it is written anew
    assert (tmp_path / "checkpoint-2" / "adapter.safetensors").stat().st_mtime_ns > kept


def test_evaluating_a_finished_run_gives_the_model_back_as_it_was(tmp_path: Path) -> None:
    run(tmp_path, bf16=True)
    made, _ = run(tmp_path, bf16=True, trainer={"eval_dataset": rows()})
    ids = {"input_ids": torch.tensor(rows()[:2]["input_ids"])}
    with torch.no_grad():
        before = made.model(**ids).logits
        made.evaluate()
        after = made.model(**ids).logits
    assert "forward" not in vars(made.model)
    assert (
        torch.equal(after, before) and after.dtype == torch.float32
    )  # fp32, where bf16 was left on


def test_the_same_command_with_other_logging_or_saving_goes_on(tmp_path: Path) -> None:
    _, first = run(tmp_path)
    made, again = run(tmp_path, logging_steps=2, save_total_limit=5, save_steps=3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert made.state.global_step == 4


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("patience", [None, 1])
def test_a_repeated_run_gives_the_best_weights_again_also_where_it_was_stopped_early(
    tmp_path: Path, patience: int | None, limit: int | None
) -> None:
    callbacks = [EarlyStoppingCallback(patience)] if patience else []
    settings = {
        "max_steps": 8, "save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "learning_rate": 0.3,
        "load_best_model_at_end": True, "save_total_limit": limit, "lr_scheduler_type": "constant", "warmup_steps": 0,
    }  # fmt: skip

    def once() -> tuple[AdapterTrainer, dict[str, Tensor]]:
        return run(
            tmp_path,
            trainer={"eval_dataset": rows(seed=9, count=4), "callbacks": list(callbacks)},
            **settings,
        )

    made, first = once()
    best = Path(made.state.best_model_checkpoint).name
    assert (
        best != f"checkpoint-{made.state.global_step}"
    )  # or last and best could not be told apart
    assert (made.state.global_step < 8) is bool(patience)
    assert made.args.save_total_limit == limit
    if limit:
        assert {path.name for path in tmp_path.glob("checkpoint-*")} == {
            best,
            f"checkpoint-{made.state.global_step}",
        }
    written = read_mark(tmp_path / f"checkpoint-{made.state.global_step}")["written"]
    repeated, again = once()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert repeated.state.global_step == made.state.global_step
    folder = tmp_path / f"checkpoint-{made.state.global_step}"
    assert read_mark(folder)["written"] == written  # nothing was trained or saved


def test_a_folder_that_was_moved_still_gives_its_best_weights(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = {"eval_dataset": rows(seed=9, count=4)}
    _, first = run(tmp_path / "a", trainer=trainer, **settings)
    (tmp_path / "a").rename(tmp_path / "b")
    _, again = run(tmp_path / "b", trainer=trainer, **settings)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_best_checkpoint_is_kept_however_its_folder_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (1, 2, 3):
        folder = Path("out") / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / COMPLETE).write_text(json.dumps({"written": step}))
    rotate_checkpoints(Path("out"), 1, "./out/checkpoint-1")
    assert {path.name for path in Path("out").iterdir()} == {"checkpoint-1", "checkpoint-3"}


def test_a_run_from_before_losses_and_arguments_were_described_goes_on(tmp_path: Path) -> None:
    _, expected = run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-4")
    mark = tmp_path / "checkpoint-2" / COMPLETE
    old = read_json(mark)
    del old["run"]["arguments"], old["run"]["compute_loss_func"]
    mark.write_text(json.dumps(old))
    kept = mark.read_bytes()
    _, found = run(tmp_path)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert mark.read_bytes() == kept  # gone on from, not trained anew


def test_a_callbacks_attribute_of_that_name_is_no_description(tmp_path: Path) -> None:
    class Theirs(TrainerCallback):
        settings = {"project": "mine"}

    made, _ = run(tmp_path, max_steps=1, trainer={"callbacks": [Theirs()]})
    assert made.state.global_step == 1 and "Theirs" not in made.described["callbacks"]


def test_settings_that_json_can_not_hold_are_refused_before_a_step(tmp_path: Path) -> None:
    steps: list[int] = []

    class Torn(TrainerCallback):
        def settings(self) -> dict[str, Any]:
            return {"weights": torch.ones(2)}

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            steps.append(1)

    with pytest.raises(ValueError, match="can't be described.*Tensor"):
        run(tmp_path, trainer={"callbacks": [Torn()]})
    assert not steps and not list(tmp_path.glob("checkpoint-*"))


def test_a_fingerprint_tells_rows_apart_and_leaves_out_what_changes_by_itself() -> None:
    class Random:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"input_ids": torch.randn(4)}

    one, other = rows(), rows(count=11)
    assert fingerprint(one) == fingerprint(rows()) != fingerprint(other)
    assert fingerprint(one.with_format("torch")) == fingerprint(one)
    assert fingerprint(Random()) == fingerprint(None) == UNKNOWN
    assert fingerprint(iter([])) == UNKNOWN


def test_a_function_is_named_with_what_is_fixed_of_it() -> None:
    assert name_of(penalty) == "penalty" and name_of(None) is None
    assert name_of(functools.partial(penalty, weight=0.5)) == "penalty(weight=0.5)"
    assert name_of(Aux()) == "Aux" and name_of(Aux) == "Aux"


def test_a_mark_says_that_the_run_was_finished(tmp_path: Path) -> None:
    run(tmp_path)
    assert read_mark(tmp_path / "checkpoint-4")["finished"]
    assert not read_mark(tmp_path / "checkpoint-2")["finished"]
    assert (tmp_path / "checkpoint-4" / COMPLETE).is_file()


def test_a_checkpoint_without_its_optimiser_is_not_gone_on_from(tmp_path: Path) -> None:
    """Its moments would start at zero: other weights than an uninterrupted run's."""
    run(tmp_path, save_only_model=True)
    trainer, _ = run(tmp_path, save_only_model=True)  # finished: nothing is trained
    assert trainer.state.global_step == 4
    shutil.rmtree(tmp_path / "checkpoint-4")
    with pytest.raises(FileNotFoundError, match="without its optimiser.*load_adapter"):
        run(tmp_path, save_only_model=True)


def test_an_interrupted_training_leaves_no_noise_in_the_embedding(tmp_path: Path) -> None:
    seen: list[nn.Module] = []

    class Stop(TrainerCallback):
        def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
            seen.append(model)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, neftune_noise_alpha=5.0, trainer={"callbacks": [Stop()]})
    model = seen[0]
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model.train()(ids).logits, model(ids).logits, atol=0, rtol=0)
