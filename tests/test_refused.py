"""`lora_course.refused`: what AdapterTrainer does not train with is said before it starts, and the model is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model
from torch import nn
from transformers import DataCollatorForSeq2Seq

from lora_course.arguments import training_arguments
from lora_course.injection import inject, merge, unload, unmerge
from lora_course.refused import check_rows
from lora_course.states import adapter_state, use_adapter
from lora_course.training import AdapterTrainer
from tests.models import SHAPE, config, qwen, randomize


def rows(*lengths: int, labels: int | None = None) -> datasets.Dataset:
    found = []
    for length in lengths or (8,) * 12:
        ids = torch.randint(97, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        found.append({"input_ids": ids, "labels": ids if labels is None else [labels] * length})
    return datasets.Dataset.from_list(found)


def made(
    folder: Path, model: nn.Module | None = None, data: Any = None, **fields: Any
) -> AdapterTrainer:
    given = {
        name: fields.pop(name)
        for name in ("model_init", "peft_config", "eval_dataset")
        if name in fields
    }
    settings = {
        "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "bf16": False, "disable_tqdm": True,
        "save_strategy": "no", **fields,
    }  # fmt: skip
    return AdapterTrainer(
        model or randomize(inject(qwen(), config())),
        training_arguments(folder, device="cpu", **settings),
        train_dataset=rows() if data is None else data,
        **given,
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"push_to_hub": True}, "push_to_hub=True: .*export_peft"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True: .*per_device_train_batch_size"),
        ({"bf16_full_eval": True}, "bf16_full_eval=True: .*bf16=True evaluates"),
        ({"model_init": qwen}, "model_init is given: .*give the injected model"),
        ({"peft_config": config()}, "peft_config is given: .*leave it out"),
    ],
)  # fmt: skip
def test_a_field_that_would_make_it_another_training(
    tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        made(tmp_path, **fields)
    with pytest.raises(ValueError, match="push_to_hub: .*export_peft"):
        made(tmp_path).push_to_hub("somebody/something")


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [[1, 2], [3]], "labels": 0},
        {"input_ids": [1, 2], "labels": "a text"},
        {"input_ids": [1, 2], "labels": 1},
        {"input_ids": [1, 2]},
        {"pixels": [0.5]},
        [1, 2],
    ],
    ids=str,
)
def test_rows_of_other_kinds_pass(row: Any) -> None:
    check_rows([row] * 3, qwen(), 2, None)


def test_an_adapter_that_can_not_learn(tmp_path: Path) -> None:
    rounded = randomize(inject(qwen(), config())).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"bfloat16, which rounds.*before inject"):
        made(tmp_path, rounded)
    away = cpu_offload(randomize(inject(qwen(), config())), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded.*dispatch the base first"):
        made(tmp_path, away)
    more = randomize(inject(qwen(), config()))
    more.lm_head.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"'lm_head.weight' \(1 in all\).*checkpoints would not hold it"
    ):
        made(tmp_path, more)
    with pytest.raises(ValueError, match=r"q_proj.*\.lora_A.*no part of the adapter"):
        made(tmp_path, get_peft_model(inject(qwen(), config()), config()))
    trainer = made(tmp_path)
    merge(trainer.model)  # after the trainer was made
    with pytest.raises(ValueError, match="merged.*unmerge"):
        trainer.train()
    unmerge(trainer.model).requires_grad_(False)
    with pytest.raises(ValueError, match="requires a gradient"):
        trainer.train()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (rows().select([]), "no rows"),
        (rows(8, 0, 8), "row without tokens"),
        (datasets.Dataset.from_list([{"input_ids": [5, 97], "labels": [5, 97]}] * 4), "token 97, and the model's are 0 to 96"),
        (datasets.Dataset.from_list([{"input_ids": [5, -1], "labels": [5, 6]}] * 4), "token -1"),
        (rows(8, 8, labels=-100), "No label counts in 2 rows"),
        (rows(1, 1), "No label counts in 2 rows"),
        (rows(5, 8, 6), "5 to 8 tokens, and nothing pads them.*DataCollatorForSeq2Seq"),
    ],
)  # fmt: skip
def test_rows_that_can_not_be_learnt_from(tmp_path: Path, data: Any, said: str) -> None:
    trainer = made(tmp_path, data=data)
    before = adapter_state(trainer.model)
    with pytest.raises(ValueError, match=said):
        trainer.train()
    after = adapter_state(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(tmp_path.iterdir())


def test_rows_longer_than_the_model_was_made_for_are_said(tmp_path: Path) -> None:
    long = SHAPE["max_position_embeddings"] + 1
    with pytest.warns(UserWarning, match=f"{long} tokens, and the model was made for {long - 1}"):
        made(tmp_path, data=rows(long, long), max_steps=1).train()


def test_a_step_without_a_label_that_counts_teaches_nothing_and_is_said(tmp_path: Path) -> None:
    """0 / 0 tokens would make every factor NaN, and with it the hours before."""
    data = datasets.concatenate_datasets([rows(*[8] * 6), rows(*[8] * 6, labels=-100)])
    trainer = made(tmp_path, data=data, max_steps=12, per_device_train_batch_size=1)
    with pytest.warns(UserWarning, match="6 forward passes.*taught nothing"):
        trainer.train()
    losses = [entry["loss"] for entry in trainer.history]
    assert losses.count(0.0) == 6 and all(loss == loss for loss in losses)
    assert all(torch.isfinite(tensor).all() for tensor in adapter_state(trainer.model).values())


def test_a_best_that_no_evaluation_found_is_said(tmp_path: Path) -> None:
    unscored = rows(8, 8, labels=-100)  # the mean over no token is NaN
    trainer = made(
        tmp_path, eval_dataset=unscored, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps",
        eval_steps=1, save_steps=1,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="No evaluation gave a number for loss.*not the best"):
        trainer.train()


def test_ragged_rows_are_taken_with_a_collator_that_pads(tmp_path: Path) -> None:
    class Words:
        padding_side = "right"

        def pad(self, rows: Any, **_: Any) -> dict[str, torch.Tensor]:
            width = max(len(row["input_ids"]) for row in rows)
            ids = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]
            return {"input_ids": torch.tensor(ids)}

    trainer = made(tmp_path, data=rows(5, 8, 6))
    trainer.data_collator = DataCollatorForSeq2Seq(Words())
    trainer.train()
    assert len(trainer.history) == 2


def test_a_trainer_trains_the_adapter_that_is_there_now(tmp_path: Path) -> None:
    """The optimiser of an earlier training holds another adapter's parameters, and would leave this one as it is."""
    trainer = made(tmp_path)
    trainer.train()
    randomize(inject(unload(trainer.model), config(r=2)))
    before = adapter_state(trainer.model)
    trainer.train()
    after = adapter_state(trainer.model)
    assert all(not torch.equal(before[n], after[n]) for n in before if n.endswith((".A", ".B")))


def test_a_second_training_starts_with_an_optimiser_of_its_own(tmp_path: Path) -> None:
    """Two trainings by one trainer are those of two trainers, one after the other."""
    one = made(tmp_path)
    one.train()
    halfway = adapter_state(one.model)
    one.train()
    other = made(tmp_path)
    use_adapter(other.model, halfway)
    other.train()
    expected, found = adapter_state(other.model), adapter_state(one.model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
