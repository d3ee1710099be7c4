"""`continual.scoring`: a mean by token, of rows of one length or of several."""

import math
from pathlib import Path

import datasets
import pytest
import torch
from torch import Tensor, nn

from lora_course.continual import Sequential, Task, learn, mean_loss
from tests.continual.models import arguments, decided, injected, rows
from tests.models import qwen

pytestmark = pytest.mark.usefixtures("one_thread")


def test_mean_loss_is_by_token_and_leaves_the_mode() -> None:
    model, data = qwen().train(), rows(0, 11)
    masked = [dict(row) for row in data]
    masked[0] = {
        **masked[0],
        "labels": torch.cat([torch.full((6,), -100), masked[0]["labels"][6:]]),
    }
    logits = model.eval()(input_ids=torch.stack([row["input_ids"] for row in masked])).logits[
        :, :-1
    ]
    labels = torch.stack([row["labels"] for row in masked])[:, 1:]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    for training in (True, False):
        assert mean_loss(model.train(training), masked, batch_size=4) == pytest.approx(
            expected.item(), rel=1e-5
        )
        assert model.training is training
    model.train().model.layers[0].eval()  # a part that is frozen, dropout and all
    modes = [module.training for module in model.modules()]
    mean_loss(model, masked)
    assert [module.training for module in model.modules()] == modes


def test_a_batch_or_all_rows_without_a_label_do_not_make_the_mean_of_the_others_nan() -> None:
    ids = rows(0, 4)["input_ids"][:]
    labels = ids.clone()
    labels[2:] = -100
    some = datasets.Dataset.from_dict({"input_ids": ids.numpy(), "labels": labels.numpy()})
    scored = datasets.Dataset.from_dict({"input_ids": ids[:2].numpy(), "labels": ids[:2].numpy()})
    model = decided()
    assert mean_loss(model, some, batch_size=2) == pytest.approx(mean_loss(model, scored))
    none = datasets.Dataset.from_dict(
        {"input_ids": ids.numpy(), "labels": torch.full_like(ids, -100).numpy()}
    )
    assert math.isnan(mean_loss(model, none))


def padded(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(row["labels"]) for row in batch)

    def filled(key: str, value: int) -> Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in batch])

    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100)}


def test_rows_of_several_lengths_are_scored_with_trainings_collator(tmp_path: Path) -> None:
    ids = [[5 + i % 5] * (3 + i) for i in range(6)]
    ragged = [{"input_ids": row, "labels": row} for row in ids]
    model = injected()
    with pytest.raises(ValueError, match="3 to 8 tokens, and nothing pads them"):
        mean_loss(model, ragged)
    tokens = [len(row) - 1 for row in ids]
    summed = sum(mean_loss(model, [row]) * n for row, n in zip(ragged, tokens, strict=True))
    expected = summed / sum(tokens)
    # rounding of sums over batches of another shape
    assert mean_loss(model, ragged, 4, padded) == pytest.approx(expected, rel=1e-5)
    task = Task("ragged", ragged, ragged)
    found = learn(model, [task], Sequential(), arguments(tmp_path), data_collator=padded)
    assert found.matrix[0].item() == pytest.approx(expected, rel=1e-5)
