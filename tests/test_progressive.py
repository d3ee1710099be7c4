"""`lora_course.progressive`: stages stacked and merged, the function at their boundaries, kills, and one adapter of it all."""

import copy
import gc
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from lora_course import progressive
from lora_course.checkpoint import load_adapter, read_extra, save_adapter
from lora_course.export import export_peft
from lora_course.injection import adapter_layers, disabled, inject, merge, unload, unmerge
from lora_course.progressive import (
    StackedLoRALinear,
    Stage,
    begin_stage,
    inject_stages,
    load_stage,
    multiplier,
    train_stages,
)
from lora_course.qlora import quantize_model
from lora_course.states import adapter_state, concatenate, factor_state, use_adapter
from lora_course.training import AdapterTrainer, training_arguments
from tests.models import batch, config, linear4bit, qwen, relative

STAGES = [
    Stage(3, ["q_proj", "down_proj"], 1e-2, 4),
    Stage(2, ["q_proj", "v_proj"], 2e-2, 5, warmup=2),
    Stage(5, r".*layers\.1\..*(q|up)_proj", 1e-2, 3, warmup=0),
]
MODES = ("stack", "merge")


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """One thread, as on tensors this small two wait for each other; and what was imported is kept out of the garbage
    collections that end each training, 0.7 s each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def rows(count: int = 24) -> datasets.Dataset:
    ids = torch.randint(97, (count, 12), generator=torch.Generator().manual_seed(1)).numpy()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")


def train(
    model: nn.Module,
    folder: Path,
    mode: str = "stack",
    stages: list[Stage] = STAGES,
    **fields: object,
) -> list[dict]:
    settings = {
        "per_device_train_batch_size": 4,
        "save_steps": 2,
        "disable_tqdm": True,
        "device": "cpu",
        "bf16": False,
    }
    return train_stages(model, stages, rows(), folder, mode, **settings | fields)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch()).logits


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(".base_layer", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if not name.endswith((".A", ".B"))
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fill(model: nn.Module, seed: int) -> None:
    """The trained factors as after training."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model).values():
        layer.A.data.normal_(std=0.1, generator=generator)
        layer.B.data.normal_(std=0.1, generator=generator)


def stacked(
    base: nn.Module | None = None,
    mode: str = "stack",
    stages: list[Stage] = STAGES,
    **fields: object,
) -> nn.Module:
    """All stages gone through, with random factors instead of a training."""
    model = inject_stages(base or qwen(), stages, **fields)
    for index, stage in enumerate(stages):
        begin_stage(model, stage, seed=index)
        fill(model, index)
        if mode == "merge":
            merge(model)
    return model


class Watch(TrainerCallback):
    """What the function is, and the optimiser holds, as each stage begins and ends."""

    def __init__(self) -> None:
        self.begins, self.ends, self.rates, self.moments = [], [], [], []

    def on_train_begin(self, args, state, control, model=None, **_) -> None:
        self.begins.append(logits(model.eval()))
        self.rates.append([])

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_) -> None:
        if state.global_step == 0:
            self.moments.append(sum(len(moments) for moments in optimizer.state.values()))
        self.rates[-1].append(optimizer.param_groups[0]["lr"])

    def on_train_end(self, args, state, control, model=None, **_) -> None:
        self.ends.append(logits(model.eval()))


# ------------------------------------------------------------------------------------------ the layer


def layer_of_three_stages() -> tuple[StackedLoRALinear, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    layer = StackedLoRALinear(nn.Linear(7, 5), r=2, lora_alpha=3, lora_dropout=0.5)
    pairs = []
    for r in (2, 0, 4):
        if pairs:
            layer.freeze()
            layer.start(r)
        layer.A.data.normal_(), layer.B.data.normal_()
        pairs.append((layer.A.detach().clone(), layer.B.detach().clone()))
    return layer, pairs


def test_the_layer_computes_the_sum_of_its_stages_at_one_scale() -> None:
    layer, pairs = layer_of_three_stages()
    x = torch.randn(2, 3, 7)
    delta = sum(1.5 * B @ A for A, B in pairs)
    expected = layer.base_layer(x) + x @ delta.t()
    torch.testing.assert_close(layer.eval()(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.delta_weight(), delta, atol=1e-5, rtol=1e-5)
    A, B, scaling = layer.factors()
    assert A.shape == (6, 7) and B.shape == (5, 6) and scaling == 1.5 and layer.lora_alpha == 6
    assert all(
        torch.equal(a, b) for found, kept in zip(layer.stages(), pairs) for a, b in zip(found, kept)
    )
    layer.merge()
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_dropout_is_for_the_stage_that_trains_and_gradients_are_too() -> None:
    layer, pairs = layer_of_three_stages()
    x = torch.ones(1, 7)
    layer.train()
    torch.manual_seed(3)
    found = layer(x)
    torch.manual_seed(3)
    dropped = layer.lora_dropout(x)
    frozen = sum(1.5 * x @ (B @ A).t() for A, B in pairs[:2])
    torch.testing.assert_close(
        found,
        layer.base_layer(x) + frozen + 1.5 * dropped @ (pairs[2][1] @ pairs[2][0]).t(),
        atol=1e-5,
        rtol=1e-5,
    )
    layer.training = False  # dropout that is left on in evaluation, for several samples, is still for what trains
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), found, atol=0, rtol=0)
    found.sum().backward()
    assert layer.A.grad.abs().max() > 0 and layer.B.grad.abs().max() > 0
    assert {name for name, _ in layer.named_parameters() if not name.startswith("base")} == {
        "A",
        "B",
    }
    assert not layer.frozen_A.requires_grad and layer.base_layer.weight.grad is None


def test_with_one_stage_it_is_lora() -> None:
    torch.manual_seed(0)
    plain = inject(qwen(), config())
    torch.manual_seed(0)
    ours = inject(qwen(), config(), StackedLoRALinear)
    for model in (plain, ours):
        fill(model, 4)
        model(**batch()).loss.backward()
    torch.testing.assert_close(logits(ours), logits(plain), atol=1e-5, rtol=1e-5)
    for name, layer in adapter_layers(plain).items():
        assert relative(adapter_layers(ours)[name].B.grad, layer.B.grad) < 1e-5


@pytest.mark.parametrize("kind", ["autocast", "bf16", "4bit"])
def test_other_precisions_agree_with_plain_lora_of_the_same_factors(kind: str) -> None:
    base = (
        qwen().to(torch.bfloat16)
        if kind == "bf16"
        else quantize_model(qwen())
        if kind == "4bit"
        else qwen()
    )
    ours = stacked(copy.deepcopy(base))
    one = inject(base, config(r=1, target_modules=sorted(adapter_layers(ours))))
    use_adapter(one, factor_state(ours))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        mine, other = logits(ours), logits(one)
    assert mine.dtype == other.dtype
    assert all(p.dtype == torch.float32 for n, p in ours.named_parameters() if n.endswith(".A"))
    # in bf16 a layer's sum is rounded once for each of the two parts, to 8 bits
    assert relative(mine.float(), other.float()) < (1e-5 if kind == "4bit" else 3e-2)


def test_checkpointed_gradients_and_cached_generation_are_those_of_the_full_pass() -> None:
    model = stacked()
    model(**batch()).loss.backward()
    expected = {
        name: layer.B.grad.clone() for name, layer in adapter_layers(model).items() if layer.r
    }
    model.zero_grad()
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    model(**batch(), use_cache=False).loss.backward()
    assert all(
        relative(adapter_layers(model)[name].B.grad, grad) < 1e-5 for name, grad in expected.items()
    )
    model.eval().activation_checkpointing_disable()
    ids = batch()["input_ids"][:1]
    written = [
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            use_cache=c,
            pad_token_id=0,
        )
        for c in (True, False)
    ]
    assert torch.equal(*written)


# ------------------------------------------------------------------------------------------ boundaries


@pytest.mark.parametrize("mode", MODES)
def test_the_function_is_unchanged_at_a_boundary_and_the_new_stage_can_learn(mode: str) -> None:
    model = inject_stages(qwen(), STAGES)
    torch.testing.assert_close(logits(model), logits(qwen()), atol=0, rtol=0)
    for index, stage in enumerate(STAGES):
        if index and mode == "merge":
            merge(model)
        before = logits(model)
        begin_stage(model, stage)
        # fp32: what was one product is now two sums, or a weight rounded once more
        torch.testing.assert_close(logits(model), before, atol=2e-6, rtol=2e-6)
        layers = adapter_layers(model)
        assert all(
            layer.scaling == 2 and (layer.A != 0).all() and not layer.B.any()
            for layer in layers.values()
        )
        assert sum(layer.r for layer in layers.values()) == stage.r * {0: 4, 1: 4, 2: 2}[index]
        fill(model, index)
        assert (
            relative(logits(model), before) > 1e-2
        )  # so that the next boundary has something to keep


def test_both_modes_and_the_reloaded_adapter_are_one_function(tmp_path: Path) -> None:
    ours, merged = stacked(), stacked(mode="merge")
    assert relative(logits(merged), logits(ours)) < 1e-5
    save_adapter(merged, tmp_path)
    assert relative(logits(load_adapter(qwen(), tmp_path)), logits(ours)) < 1e-5
    assert same(adapter_state(merged), adapter_state(ours))


def test_all_linear_leaves_the_head_to_a_stage_that_names_it() -> None:
    stages = [Stage(2), Stage(2, ["lm_head"])]
    ranks = [
        {
            name: layer.r
            for name, layer in adapter_layers(
                begin_stage(inject_stages(qwen(), stages), stage)
            ).items()
        }
        for stage in stages
    ]
    assert ranks[0]["lm_head"] == 0 and sum(r == 0 for r in ranks[0].values()) == 1
    assert ranks[1]["lm_head"] == 2 and sum(r > 0 for r in ranks[1].values()) == 1


def test_fresh_factors_come_from_the_seed_and_are_new_parameters() -> None:
    states = []
    for _ in range(2):
        torch.randn(3)  # what was drawn before does not matter
        model = inject_stages(qwen(), STAGES)
        begin_stage(model, STAGES[0], seed=7)
        states.append(adapter_state(model))
        old = [p for p in model.parameters() if p.requires_grad]
    assert same(*states)
    assert not same(
        states[0], adapter_state(begin_stage(inject_stages(qwen(), STAGES), STAGES[0], seed=8))
    )
    begin_stage(model, STAGES[1], seed=8)
    assert not {id(p) for p in old} & {id(p) for p in model.parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """A finished run of each mode: its folder, model, watch and results."""
    runs = {}
    for mode in MODES:
        folder, model, watch = tmp_path_factory.mktemp(mode), qwen(), Watch()
        runs[mode] = (
            folder,
            model,
            watch,
            train(model, folder, mode, trainer={"callbacks": [watch]}),
        )
    return runs


@pytest.mark.parametrize("mode", MODES)
def test_a_run_through_all_stages(finished: dict, mode: str) -> None:
    tmp_path, model, watch, results = finished[mode]
    base = weights(qwen())
    assert [result["stage"] for result in results] == [0, 1, 2]
    assert [len(result["history"]) for result in results] == [4, 5, 3]
    # no moment is left of the stage before, and the rate starts at 0 (the last stage has no warm-up)
    assert watch.moments == [0, 0, 0]
    assert watch.rates == [
        [s.learning_rate * multiplier(STAGES, k, step) for step in range(s.steps)]
        for k, s in enumerate(STAGES)
    ]
    assert [rates[0] == 0 for rates in watch.rates] == [True, True, False]
    assert torch.equal(watch.begins[0], logits(qwen()))
    for end, begin in zip(watch.ends, watch.begins[1:]):
        torch.testing.assert_close(begin, end, atol=2e-6, rtol=2e-6)
    assert all(relative(end, begin) > 1e-3 for begin, end in zip(watch.begins, watch.ends))
    if mode == "stack":
        assert same(weights(model), base)
    else:
        assert not same(weights(model), base) and all(
            layer.merged for layer in adapter_layers(model).values()
        )
    for k, end in enumerate(watch.ends):
        reloaded = load_stage(qwen(), tmp_path, k)
        torch.testing.assert_close(logits(reloaded), end, atol=2e-6, rtol=2e-6)
        assert same(weights(reloaded), base)
        assert len(progressive.stage_states(reloaded)) == k + 1
    final = progressive.stage_states(load_stage(qwen(), tmp_path))
    assert all(
        same(kept, final[j])
        for k in range(3)
        for j, kept in enumerate(progressive.stage_states(load_stage(qwen(), tmp_path, k)))
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "stage-0",
        "stage-1",
        "stage-2",
        "start",
    ]
    assert sorted(path.name for path in (tmp_path / "stage-2").iterdir()) == [
        "adapter.json",
        "adapter.safetensors",
    ]


def test_one_stage_is_lora_trained_by_transformers_linear_schedule(tmp_path: Path) -> None:
    model = qwen()
    train(
        model, tmp_path / "ours", stages=[Stage(3, ["q_proj", "down_proj"], 1e-2, 6, warmup=0.25)]
    )
    plain = inject(qwen(), config(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    start = inject_stages(qwen(), STAGES[:1])
    use_adapter(plain, factor_state(begin_stage(start, STAGES[0], seed=0)))
    args = training_arguments(
        tmp_path / "plain",
        "cpu",
        bf16=False,
        disable_tqdm=True,
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=1e-2,
        warmup_steps=0.25,
        lr_scheduler_type="linear",
        save_strategy="no",
    )
    AdapterTrainer(plain, args, train_dataset=rows()).train()
    ours, theirs = factor_state(model), factor_state(plain)
    assert (
        max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5
    )  # the products are summed in another order


def test_a_4bit_base_is_stacked_on_to_the_byte(tmp_path: Path) -> None:
    model = quantize_model(qwen())
    before = weights(model)
    train(model, tmp_path, gradient_checkpointing=True, gradient_accumulation_steps=2)
    assert same(weights(model), before) and any(p.dtype == torch.uint8 for p in before.values())
    torch.testing.assert_close(
        logits(load_stage(quantize_model(qwen()), tmp_path)), logits(model), atol=1e-6, rtol=1e-6
    )


def test_datasets_and_orders_differ_between_stages(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def collect(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        seen.append(torch.stack([e["input_ids"] for e in examples]))
        return {k: torch.stack([e[k] for e in examples]) for k in examples[0]}

    stages = [Stage(2, ["q_proj"], 1e-2, 2)] * 2
    train(qwen(), tmp_path / "one", stages=stages, trainer={"data_collator": collect})
    assert len(seen) == 6  # two a stage, and one that is fetched ahead
    assert not torch.equal(torch.cat(seen[:2]), torch.cat(seen[3:5]))
    seen.clear()
    parts = [rows().select(range(8)), rows().select(range(8, 16))]
    train_stages(
        qwen(),
        stages,
        parts,
        tmp_path / "two",
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        device="cpu",
        bf16=False,
        trainer={"data_collator": collect},
    )
    assert torch.equal(torch.cat(seen), rows()[:16]["input_ids"])


def test_the_learning_rate_is_warmed_at_each_restart_and_decays_over_the_run_or_the_stage() -> None:
    stages = [
        Stage(1, steps=10, warmup=0.2),
        Stage(1, steps=10, warmup=4),
        Stage(1, steps=5, warmup=0),
    ]
    run = [
        multiplier(stages, k, step) for k, stage in enumerate(stages) for step in range(stage.steps)
    ]
    assert run[0] == run[10] == 0 and run[2] == 1 and run[1] == 0.5
    assert (
        run[12] == pytest.approx(2 / 4 * 13 / 23)
        and run[20] == pytest.approx(5 / 23)
        and run[24] == pytest.approx(1 / 23)
    )
    own = [
        multiplier(stages, k, step, "stage")
        for k, stage in enumerate(stages)
        for step in range(stage.steps)
    ]
    assert (
        own[:3] == [0, 0.5, 1]
        and own[10] == 0
        and own[14] == 1
        and own[20:] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    )


# ------------------------------------------------------------------------------------------ kills


class Kill(TrainerCallback):
    def __init__(self, stage: int, step: int, blow: Callable[[], None]) -> None:
        self.at, self.blow = (stage, step), blow

    def on_step_end(self, args, state, control, **_) -> None:
        if (int(Path(args.output_dir).parent.name.split("-")[1]), state.global_step) == self.at:
            self.blow()


class Killed(BaseException):
    pass


def killed(*_: object, **__: object) -> None:
    raise Killed


def shot() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_to_the_end(
    folder: Path, mode: str, *callbacks: TrainerCallback
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict]]:
    """The command that is repeated after a kill."""
    model = qwen()
    results = train(model, folder, mode, lora_dropout=0.2, trainer={"callbacks": list(callbacks)})
    return adapter_state(model), weights(model), results


def assert_equal_runs(one: tuple, other: tuple) -> None:
    assert same(one[0], other[0]), "the factors differ"
    assert same(one[1], other[1]), "the base's weights differ"
    assert one[2] == other[2], "the histories differ"


def test_after_a_kill_the_same_command_reaches_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    code = (
        "from tests.test_progressive import *; torch.set_num_threads(1); "
        f"run_to_the_end(Path({str(tmp_path / 'killed')!r}), 'merge', Kill(1, 3, shot))"
    )
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (tmp_path / "killed/stage-1/checkpoints/checkpoint-2/complete.json").is_file()
    assert not (tmp_path / "killed/stage-1/adapter.json").exists()
    assert_equal_runs(
        run_to_the_end(tmp_path / "killed", "merge"), run_to_the_end(tmp_path / "straight", "merge")
    )


def torn(model: nn.Module, folder: Path, extra: object = None) -> None:
    """The second stage's tensors are written, its description is not."""
    save_adapter(model, folder, extra)
    if folder.name == "stage-1":
        (folder / "adapter.json").unlink()
        raise Killed


def late(model: nn.Module, folder: Path, extra: object = None) -> None:
    save_adapter(model, folder, extra)
    if folder.name == "stage-1":
        raise Killed


POINTS = {
    "in the first step": ("stack", Kill(0, 1, killed), None),
    "in a stage's last step": ("merge", Kill(1, 5, killed), None),
    "while a stage is saved": ("stack", None, ("save_adapter", torn)),
    "while a merged stage is saved": ("merge", None, ("save_adapter", torn)),
    "after a stage is saved": ("merge", None, ("save_adapter", late)),
    "before its checkpoints are gone": ("stack", None, ("shutil", None)),
}


def test_no_point_at_which_it_stops_changes_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {mode: run_to_the_end(tmp_path / mode, mode) for mode in MODES}
    for name, (mode, callback, patch) in POINTS.items():
        with monkeypatch.context() as context, pytest.raises(Killed):
            if patch == ("shutil", None):
                context.setattr(progressive.shutil, "rmtree", killed)
            elif patch:
                context.setattr(progressive, *patch)
            run_to_the_end(tmp_path / name, mode, *([callback] if callback else []))
        assert_equal_runs(run_to_the_end(tmp_path / name, mode), expected[mode])
    for mode in MODES:  # finished: nothing is trained, all comes back
        assert_equal_runs(
            run_to_the_end(tmp_path / mode, mode, Kill(0, 1, killed), Kill(2, 1, killed)),
            expected[mode],
        )


def test_another_plan_or_base_in_a_begun_folder_is_noticed(finished: dict) -> None:
    tmp_path, model = finished["stack"][0], qwen()
    with pytest.raises(ValueError, match="begun with another mode, scaling: stack, 2.0"):
        train(model, tmp_path, "merge", scaling=1.0)
    assert not hasattr(model, "lora_course")
    with pytest.warns(UserWarning, match="weights are not those"):
        train(qwen(seed=5), tmp_path)


# ------------------------------------------------------------------------------------------ one adapter, and the base back


@pytest.mark.parametrize("mode", MODES)
def test_all_stages_export_as_one_adapter_of_the_summed_rank(
    finished: dict, tmp_path: Path, mode: str
) -> None:
    model = finished[mode][1]
    expected = logits(model)
    export_peft(model, tmp_path / "peft")
    theirs = PeftModel.from_pretrained(qwen(), tmp_path / "peft")
    torch.testing.assert_close(logits(theirs), expected, atol=5e-6, rtol=5e-6)
    ranks = {
        n.removeprefix("base_model.model."): m.r["default"]
        for n, m in theirs.named_modules()
        if hasattr(m, "lora_A")
    }
    assert {(n.split(".")[2], n.rsplit(".")[-1]): r for n, r in ranks.items()} == {
        ("0", "q_proj"): 5, ("1", "q_proj"): 10, ("0", "v_proj"): 2, ("1", "v_proj"): 2, ("0", "down_proj"): 3, ("1", "down_proj"): 3, ("1", "up_proj"): 5,
    }  # fmt: skip


def test_a_stage_can_be_left_out_of_the_sum() -> None:
    model = stacked()
    states = progressive.stage_states(model)
    without = inject(qwen(), config(target_modules=sorted(adapter_layers(model))))
    use_adapter(without, concatenate(states))
    torch.testing.assert_close(logits(without), logits(model), atol=1e-5, rtol=1e-5)
    first = inject(qwen(), config(target_modules=["q_proj", "down_proj"]))
    use_adapter(first, states[0])
    torch.testing.assert_close(
        logits(first), logits(stacked(stages=STAGES[:1])), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("keep_original", [True, False])
def test_unmerging_gives_the_base_back_to_the_bit_only_from_a_copy(keep_original: bool) -> None:
    model = stacked(mode="merge", keep_original=keep_original)
    expected = logits(model)
    base = weights(qwen())
    unmerge(model)
    assert same(weights(model), base) == keep_original
    assert all((found - base[name]).abs().max() < 1e-6 for name, found in weights(model).items())
    torch.testing.assert_close(
        logits(model), expected, atol=5e-6, rtol=5e-6
    )  # the stages act beside the base again
    merge(model)
    unmerge(model)
    assert same(weights(unload(model)), base) == keep_original


def test_the_spectrum_is_that_of_the_update_and_two_stages_exceed_the_rank_of_one() -> None:
    model = stacked(stages=[Stage(3, ["q_proj", "up_proj"])] * 2)
    values = progressive.singular_values(model)
    for name, layer in adapter_layers(model).items():
        expected = torch.linalg.svdvals(layer.delta_weight().double())
        assert (
            len(values[name]) == 6 and torch.linalg.matrix_rank(layer.delta_weight()) == 6 > layer.r
        )
        torch.testing.assert_close(values[name], expected[:6], atol=1e-6, rtol=1e-5)
    assert "model.layers.0.mlp.down_proj" not in values
    assert progressive.effective_rank(torch.ones(7)) == pytest.approx(7)
    assert progressive.effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    assert progressive.effective_rank(torch.tensor([0.9, 0.1])) == pytest.approx(
        math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    )
    # wider than the layer: as many values as the weight has
    assert (
        len(
            progressive.singular_values(stacked(stages=[Stage(30, ["k_proj"])] * 2))[
                "model.layers.0.self_attn.k_proj"
            ]
        )
        == 24
    )


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(("fields", "message"), [
    ({"r": 0}, "r=0: a stage needs"), ({"r": 2.0}, "r=2.0"), ({"steps": 0}, "steps=0"), ({"learning_rate": 0}, "learning_rate=0"),
    ({"warmup": 101}, "from 0 to 100"), ({"warmup": -1}, "warmup=-1"),
])  # fmt: skip
def test_an_impossible_stage_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage(**{"r": 4} | fields)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"mode": "cola"}, "mode='cola'.*'stack'"),
    ({"schedule": "cosine"}, "schedule='cosine'.*'run'"),
    ({"stages": []}, "No stage is given"),
    ({"stages": [Stage(2, ["q_proj"]), Stage(2, ["q_prj"])]}, "q_prj.*matches no linear layer"),
    ({"max_steps": 3, "warmup_steps": 1}, "max_steps, warmup_steps: decided by the stages"),
])  # fmt: skip
def test_what_cannot_be_run_is_refused_before_anything_changes(
    tmp_path: Path, arguments: dict, message: str
) -> None:
    model = qwen()
    with pytest.raises(ValueError, match=message):
        train(model, tmp_path / "run", **arguments)
    assert (
        not (tmp_path / "run").exists()
        and not hasattr(model, "lora_course")
        and all(p.requires_grad for p in model.parameters())
    )


def test_two_datasets_for_three_stages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 datasets for 3 stages"):
        train_stages(qwen(), STAGES, [rows(), rows()], tmp_path)


def test_merging_into_a_4bit_base_is_refused_and_into_a_half_precision_one_warned_of(
    tmp_path: Path,
) -> None:
    model = quantize_model(qwen())
    before = weights(model)
    with pytest.raises(TypeError, match="q_proj' is 4-bit.*Use mode='stack'"):
        train(model, tmp_path, "merge")
    assert (
        same(weights(model), before)
        and not hasattr(model, "lora_course")
        and not list(tmp_path.iterdir())
    )
    with pytest.warns(UserWarning, match="torch.bfloat16: each merge rounds"):
        train(qwen().to(torch.bfloat16), tmp_path, "merge")


def test_stages_that_are_not_there_are_refused_by_number(finished: dict, tmp_path: Path) -> None:
    folder = finished["stack"][0]
    with pytest.raises(FileNotFoundError, match=r"no finished stage 3; finished are \[0, 1, 2\]"):
        load_stage(qwen(), folder, 3)
    with pytest.raises(FileNotFoundError, match=r"finished are \[\]"):
        load_stage(qwen(), tmp_path)
    assert read_extra(folder / "stage-0")["mode"] == "stack"


def test_layers_refuse_what_would_make_the_sum_wrong() -> None:
    model = inject_stages(qwen(), STAGES[:1])
    with pytest.raises(ValueError, match="up_proj.*matches no layer that inject_stages"):
        begin_stage(model, Stage(2, ["up_proj"]))
    with pytest.raises(ValueError, match="injected with LoRALinear.*StackedLoRALinear"):
        begin_stage(inject(qwen(), config()), STAGES[0])
    with pytest.raises(ValueError, match="does not support use_rslora"):
        inject(qwen(), config(use_rslora=True), StackedLoRALinear)
    begin_stage(model, STAGES[0])
    merge(model)
    with pytest.raises(RuntimeError, match="Call freeze"):
        next(iter(adapter_layers(model).values())).start(2)
    with pytest.raises(RuntimeError, match="merged already"):
        merge(model)
    other = adapter_state(stacked(stages=STAGES[:1] * 2))
    begin_stage(model, STAGES[0])
    fill(model, 1)
    with pytest.raises(RuntimeError, match="are merged into the base and this one is not"):
        begin_stage(model, STAGES[0])
    with pytest.raises(RuntimeError, match="base holds earlier stages"), disabled(model):
        logits(model)
    with pytest.raises(ValueError, match="holds other stages"):
        use_adapter(model, other)
    with pytest.raises(RuntimeError, match="not merged"):
        next(iter(adapter_layers(model).values())).unmerge()
    wrong = other | {"model.layers.0.self_attn.q_proj.ranks": torch.tensor([1])}
    with pytest.raises(ValueError, match=r"frozen stages.*\[1\]"):
        use_adapter(stacked(stages=STAGES[:1] * 2), wrong)


def test_a_4bit_stack_refuses_its_merge_by_name() -> None:
    layer = StackedLoRALinear(linear4bit(), r=2, lora_alpha=4)
    with pytest.raises(TypeError, match="4-bit"):
        layer.merge()
