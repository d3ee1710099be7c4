"""`continual.strategies`: what each strategy is for, and says."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_course.continual import (
    Isolated,
    Orthogonal,
    OrthogonalLoRALinear,
    Replay,
    Reservoir,
    Sequential,
    learn,
    load_results,
    mean_loss,
    metrics,
    restart,
)
from lora_course.injection import adapter_layers, inject
from lora_course.lora import LAYERS
from lora_course.qlora import quantize_model
from lora_course.sparse import GatedLoRALinear
from lora_course.states import adapter_state
from tests.adalora.models import adapted
from tests.continual.models import (
    STRATEGIES,
    arguments,
    decided,
    injected,
    plain,
    same,
    tasks,
)
from tests.models import batch, config, randomize, relative
from tests.tolerances import EXACT

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_matrix_shows_what_each_strategy_is_for(tmp_path: Path) -> None:
    found: dict[str, Tensor] = {}
    for name, make in STRATEGIES.items():
        strategy = make()
        model = injected(strategy, lora_dropout=0.0, r=8, lora_alpha=16)
        found[name] = learn(
            model,
            tasks(2),
            strategy,
            arguments(tmp_path / name, max_steps=24, learning_rate=3e-2, save_strategy="no"),
        ).matrix
        assert found[name].shape == (3, 2) and not model.training
        assert all(
            found[name][k + 1, k] < found[name][0, k] - 0.3 for k in range(2)
        )  # each task is learned
    assert all(
        torch.equal(matrix[:2, 0], found["sequential"][:2, 0]) for matrix in found.values()
    )  # until then all are one
    forgetting = {name: -metrics(matrix)["BWT"] for name, matrix in found.items()}
    assert forgetting["isolated"] == 0
    assert forgetting["sequential"] > 0.3 and forgetting["replay"] < forgetting["sequential"] / 2
    assert torch.equal(
        found["isolated"][1, 1], found["isolated"][0, 1]
    )  # a task that is not learned yet gets the base


def test_isolated_adapters_serve_by_task_and_the_model_is_given_back(tmp_path: Path) -> None:
    strategy, scores = Isolated(), []
    model = injected(strategy)
    learn(model, tasks(3), strategy, arguments(tmp_path))
    before, logits = adapter_state(model), model(**batch()).logits
    for index, state in enumerate(strategy.states):
        with strategy.serving(model, index):
            assert same(adapter_state(model), state)
            scores.append(mean_loss(model, tasks(3)[index].evaluate))
    assert same(adapter_state(model), before) and same(strategy.states[2], before)
    torch.testing.assert_close(model(**batch()).logits, logits, **EXACT)
    assert scores == load_results(tmp_path).matrix[3].tolist()
    assert not same(*strategy.states[:2])


def test_restart_draws_a_new_a_and_leaves_the_random_state() -> None:
    model = randomize(injected())
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    restart(model, 4)
    assert torch.equal(torch.rand(3), expected)
    first = adapter_state(model)
    assert all(layer.B.abs().max() == 0 for layer in adapter_layers(model).values())
    restart(randomize(model), 4)
    assert same(adapter_state(model), first)
    restart(model, 5)
    layer = adapter_layers(model)["model.layers.0.mlp.down_proj"]
    assert relative(layer.A, first["model.layers.0.mlp.down_proj.A"]) > 0.5
    assert layer.A.abs().max() <= 1 / layer.in_features**0.5  # Kaiming-uniform, as at injection


def test_restart_refuses_layers_that_keep_more_than_a_and_b_and_changes_nothing() -> None:
    gated = inject(decided(), config(), layer=GatedLoRALinear)
    for model, more in ((gated, "GatedLoRALinear, which keeps .*gate"), (adapted(), "'E', 'mask'")):
        before = adapter_state(randomize(model))
        with pytest.raises(ValueError, match=more):
            restart(model, 4)
        assert same(adapter_state(model), before)


@pytest.mark.parametrize("name", ["replay", "orthogonal", "isolated"])
def test_a_4bit_base_learns_and_its_bytes_stay(tmp_path: Path, name: str) -> None:
    strategy = STRATEGIES[name]()
    model = injected(strategy, quantize_model(decided()))
    before = {
        key: value.clone() for key, value in model.named_parameters() if not value.requires_grad
    }
    assert any(value.dtype == torch.uint8 for value in before.values())
    matrix = learn(
        model, tasks(2), strategy, arguments(tmp_path, max_steps=12, save_strategy="no")
    ).matrix
    assert all(matrix[k + 1, k] < matrix[0, k] - 0.1 for k in range(2))
    after = dict(model.named_parameters())
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="budget_bytes=0"):
        Reservoir(0)
    with pytest.raises(ValueError, match="holds no row: one takes about 12 bytes"):
        Reservoir(10).add(plain(3))
    with pytest.raises(ValueError, match="'text' holds str, no numbers"):
        Reservoir(100).add([{"text": "a row"}])
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="share"):
            Replay(100, share)
    with pytest.raises(ValueError, match="strength=-1"):
        Orthogonal(-1)


def test_an_adapter_that_can_not_start_anew_is_refused_before_the_first_task(
    tmp_path: Path,
) -> None:
    model = inject(decided(), config(target_modules=["q_proj"]), GatedLoRALinear)
    with pytest.raises(ValueError, match="GatedLoRALinear, which keeps .* would not start it anew"):
        learn(model, tasks(2), Isolated(), arguments(tmp_path / "gated"))
    assert not (tmp_path / "gated").exists()
    Sequential().check(model)  # one adapter that is trained on needs no new start


def test_strategies_say_what_was_chosen() -> None:
    assert Replay(100, 0.25, 3).settings() == {
        "strategy": "Replay",
        "budget_bytes": 100,
        "share": 0.25,
        "seed": 3,
    }
    assert Orthogonal(0.1).settings() == {
        "strategy": "Orthogonal",
        "strength": 0.1,
        "squared": False,
    }
    assert Isolated().settings() == {"strategy": "Isolated"} and Sequential().settings() == {
        "strategy": "Sequential"
    }
    assert OrthogonalLoRALinear.__name__ in LAYERS and copy.deepcopy(Replay(100)).memory.nbytes == 0
