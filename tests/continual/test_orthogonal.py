"""`continual.orthogonal`: frozen adapters, and the overlap that training takes away."""

import hashlib
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from lora_course.checkpoint import load_adapter, save_adapter
from lora_course.continual import (
    Orthogonal,
    learn,
    overlap,
)
from lora_course.export import export_peft
from lora_course.injection import adapter_layers, merge
from lora_course.states import adapter_state, use_adapter
from lora_course.training import AdapterTrainer
from tests.continual.models import arguments, decided, injected, rows, tasks
from tests.models import batch, qwen, randomize, relative
from tests.tolerances import EXACT, ROUNDED

pytestmark = pytest.mark.usefixtures("one_thread")


def test_freezing_keeps_the_function_and_the_bits_of_what_is_frozen() -> None:
    model = randomize(injected(Orthogonal(), lora_dropout=0.0))
    layer = adapter_layers(model)["model.layers.1.mlp.down_proj"]
    expected = model(**batch()).logits
    first = layer.A.detach().clone(), layer.scaling * layer.B.detach().clone()
    Orthogonal().before_task(model, 1, seed=0)
    torch.testing.assert_close(model(**batch()).logits, expected, **ROUNDED)
    assert torch.equal(layer.past_A, first[0]) and torch.equal(layer.past_B, first[1])
    assert layer.B.abs().max() == 0 and relative(layer.A, first[0]) > 0.5
    assert [name for name, _ in layer.named_parameters() if not name.startswith("base")] == [
        "A",
        "B",
    ]
    randomize(model, 2)
    changed = model(**batch()).logits
    A, B, scaling = layer.factors()
    assert A.shape[0] == 6 and scaling == 1
    x = torch.randn(2, 4, layer.in_features)
    torch.testing.assert_close(layer(x) - layer.base_layer(x), x @ (B @ A).t(), **ROUNDED)
    torch.testing.assert_close(merge(model)(**batch()).logits, changed, **ROUNDED)


def test_overlap_is_the_sum_over_pairs_of_rows_of_all_layers() -> None:
    model = randomize(injected(Orthogonal()))
    assert overlap(model) == 0
    Orthogonal().before_task(model, 1, seed=0)
    randomize(model, 2)
    Orthogonal().before_task(model, 2, seed=0)
    randomize(model, 3)
    absolute = squared = 0.0
    for layer in adapter_layers(model).values():
        for old in layer.past_A:
            for new in layer.A:
                absolute += abs(old @ new).item()
                squared += (old @ new).item() ** 2
    assert overlap(model).item() == pytest.approx(absolute, rel=1e-5)
    assert overlap(model, squared=True).item() == pytest.approx(squared, rel=1e-5)
    assert Orthogonal(0.3).penalty(model).item() == pytest.approx(0.3 * absolute, rel=1e-5)
    assert Orthogonal(0.3, squared=True).penalty(model).item() == pytest.approx(
        0.3 * squared, rel=1e-5
    )
    for layer in adapter_layers(model).values():  # rows out of the span of the past ones
        Q = torch.linalg.qr(layer.past_A.t()).Q
        layer.A.data -= layer.A.data @ Q @ Q.t()
    assert overlap(model) < 1e-4 * absolute


@pytest.mark.parametrize("squared", [False, True])
def test_the_penalty_goes_towards_zero_in_training_and_without_it_does_not(
    tmp_path: Path, squared: bool
) -> None:
    ends = {}
    for strength in (0.0, 1.0):
        model, strategy = injected(Orthogonal()), Orthogonal(strength, squared)
        strategy.before_task(model, 0, 0)
        randomize(model)
        strategy.before_task(model, 1, 0)
        past = {
            name: (layer.past_A.clone(), layer.past_B.clone())
            for name, layer in adapter_layers(model).items()
        }
        start = overlap(model).item()
        args = arguments(
            tmp_path / f"{strength}",
            max_steps=40,
            learning_rate=3e-2,
            save_strategy="no",
            lr_scheduler_type="linear",
        )
        AdapterTrainer(model, args, train_dataset=rows(1), auxiliary_loss=strategy.penalty).train()
        ends[strength] = overlap(model).item() / start
        for name, layer in adapter_layers(model).items():
            assert torch.equal(layer.past_A, past[name][0]) and torch.equal(
                layer.past_B, past[name][1]
            )
            assert layer.B.abs().max() > 0.01
    # 40 steps of a falling rate: 6% is left of the absolute overlap, 7% of the squared one
    assert ends[1.0] < 0.1 and ends[0.0] > 0.5


def test_a_frozen_adapter_never_changes_by_a_bit_when_tasks_are_added(tmp_path: Path) -> None:
    strategy = Orthogonal(0.01)
    model = injected(strategy)
    learn(model, tasks(2), strategy, arguments(tmp_path))
    files = {
        path: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob("stage-*/*")
    }
    trained = {
        name: (layer.A.clone(), layer.scaling * layer.B.clone())
        for name, layer in adapter_layers(model).items()
    }
    first = {
        name: (layer.past_A.clone(), layer.past_B.clone())
        for name, layer in adapter_layers(model).items()
    }
    learn(model, tasks(4), strategy, arguments(tmp_path))
    for name, layer in adapter_layers(model).items():
        assert layer.past_A.shape[0] == 9
        assert torch.equal(layer.past_A[:3], first[name][0]) and torch.equal(
            layer.past_B[:, :3], first[name][1]
        )
        assert torch.equal(layer.past_A[3:6], trained[name][0]) and torch.equal(
            layer.past_B[:, 3:6], trained[name][1]
        )
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files} == files


def test_orthogonal_adapters_save_and_export(tmp_path: Path) -> None:
    model = randomize(injected(Orthogonal(), lora_dropout=0.0))
    Orthogonal().before_task(model, 1, 0)
    randomize(model, 2)
    expected = model(**batch()).logits
    again = load_adapter(decided(), save_adapter(model, tmp_path / "own"))
    torch.testing.assert_close(again(**batch()).logits, expected, **EXACT)
    loaded = PeftModel.from_pretrained(decided(), export_peft(model, tmp_path / "peft"))
    torch.testing.assert_close(loaded(**batch()).logits, expected, **ROUNDED)
    state = adapter_state(model)
    state["model.layers.0.mlp.down_proj.past_A"] = torch.zeros(5, 7)
    with pytest.raises(
        ValueError, match=r"past factors for 'model.layers.0.mlp.down_proj'.*another base"
    ):
        use_adapter(model, state)


@pytest.mark.parametrize("case", ["bf16", "autocast", "checkpointing"])
def test_the_past_adapters_compute_in_the_types_of_the_layer(case: str) -> None:
    def build(dtype: torch.dtype = torch.float32) -> nn.Module:
        model = randomize(injected(Orthogonal(), qwen().to(dtype), lora_dropout=0.0))
        Orthogonal().before_task(model, 1, 0)
        return randomize(model, 2)

    def gradients(model: nn.Module) -> list[Tensor]:
        model(**batch(), use_cache=False).loss.backward()
        return [layer.A.grad for layer in adapter_layers(model).values()]

    reference = build()
    logits = reference(**batch()).logits
    if case == "bf16":
        found = build(torch.bfloat16)(**batch()).logits
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(
            found.float(), logits, atol=0.1, rtol=0.1
        )  # every product is rounded to 2⁻⁸
    elif case == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(
                build()(**batch()).logits.float(), logits, atol=0.1, rtol=0.1
            )
    else:
        model = build().train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for plain_gradient, checkpointed in zip(
            gradients(reference.train()), gradients(model), strict=True
        ):
            torch.testing.assert_close(plain_gradient, checkpointed, atol=1e-6, rtol=1e-5)
