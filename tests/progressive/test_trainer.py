"""`progressive.trainer`: runs through all stages, kills, rates, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from lora_course import progressive
from lora_course.arguments import training_arguments
from lora_course.checkpoint import load_adapter, read_extra, save_adapter
from lora_course.export import export_peft
from lora_course.injection import adapter_layers, inject, unload
from lora_course.progressive import (
    Stage,
    begin_stage,
    inject_stages,
    load_stage,
    multiplier,
    train_stages,
    trainer,
)
from lora_course.qlora import quantize_model
from lora_course.states import adapter_state, factor_state, use_adapter
from lora_course.training import AdapterTrainer
from tests.models import config, qwen, relative
from tests.processes import run_until_shot
from tests.progressive.models import MODES, STAGES, logits, same, stacked, weights

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_both_modes_and_the_reloaded_adapter_are_one_function(tmp_path: Path) -> None:
    ours, merged = stacked(), stacked(mode="merge")
    assert relative(logits(merged), logits(ours)) < 1e-5
    save_adapter(merged, tmp_path)
    assert relative(logits(load_adapter(qwen(), tmp_path)), logits(ours)) < 1e-5
    assert same(adapter_state(merged), adapter_state(ours))


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
    run_until_shot(
        "tests.progressive.test_trainer",
        f"run_to_the_end(Path({str(tmp_path / 'killed')!r}), 'merge', Kill(1, 3, shot))",
    )
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
                context.setattr(trainer.shutil, "rmtree", killed)
            elif patch:
                context.setattr(trainer, *patch)
            run_to_the_end(tmp_path / name, mode, *([callback] if callback else []))
        assert_equal_runs(run_to_the_end(tmp_path / name, mode), expected[mode])
    for mode in MODES:  # finished: nothing is trained, all comes back
        assert_equal_runs(
            run_to_the_end(tmp_path / mode, mode, Kill(0, 1, killed), Kill(2, 1, killed)),
            expected[mode],
        )


def test_another_plan_or_base_in_a_begun_folder_is_noticed(finished: dict) -> None:
    tmp_path, model = finished["stack"][0], qwen()
    for change, named in (
        (
            {"mode": "merge", "scaling": 1.0},
            "mode is 'stack' there and 'merge' here.*scaling is 2.0",
        ),
        ({"stages": [*STAGES[:-1], Stage(3, ["q_proj"], 1e-3, 4)]}, r"stages\.2\."),
        ({"per_device_train_batch_size": 2}, r"rows_a_step is 4 there and 2 here"),
        ({"weight_decay": 0.5}, r"weight_decay is 0\.0 there and 0\.5 here"),
        ({"trainer": {"auxiliary_loss": logits}}, "auxiliary_loss is None there and 'logits' here"),
    ):
        with pytest.raises(ValueError, match=named):
            train(model, tmp_path, **change)
        assert not hasattr(model, "lora_course")
    with pytest.raises(ValueError, match=r"rows\.0 is"):
        train_stages(model, STAGES, rows(20), tmp_path, per_device_train_batch_size=4, save_steps=2, device="cpu", bf16=False)  # fmt: skip
    with pytest.warns(UserWarning, match="weights are not those"):
        train(qwen(seed=5), tmp_path)


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


def test_numbers_of_numpy_are_taken_and_a_plan_that_can_not_be_written_changes_nothing(
    tmp_path: Path,
) -> None:
    stage = Stage(2, ["q_proj"], numpy.float32(0.5), 1, warmup=numpy.float32(0))
    train(qwen(), tmp_path / "a", stages=[stage])
    assert read_extra(tmp_path / "a" / "start")["stages"]["0"]["learning_rate"] == 0.5

    class Torn(TrainerCallback):
        def settings(self) -> dict[str, Tensor]:
            return {"weights": torch.ones(2)}

    model = qwen()
    with pytest.raises(ValueError, match="JSON can't hold"):
        train(model, tmp_path / "b", stages=[stage], trainer={"callbacks": [Torn()]})
    assert not hasattr(model, "lora_course") and all(p.requires_grad for p in model.parameters())
    assert not list(tmp_path.glob("b/*"))


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


def test_another_plan_starts_anew_when_asked_to(tmp_path: Path) -> None:
    train(qwen(), tmp_path, stages=STAGES[:1])
    model, fresh = qwen(), qwen()
    train(model, tmp_path, scaling=1.0, overwrite=True)
    train(fresh, tmp_path / "fresh", scaling=1.0)
    assert same(adapter_state(model), adapter_state(fresh))


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_that_was_stopped_half_way_gives_the_base_back(tmp_path: Path, keep: bool) -> None:
    model, expected = qwen(), logits(qwen())

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_) -> None:
            if "stage-1" in args.output_dir:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path, "merge", keep_original=keep, trainer={"callbacks": [Stop()]})
    assert relative(logits(unload(model)), expected) < (1e-12 if keep else 1e-5)
    half = qwen().to(torch.bfloat16)
    with pytest.warns(UserWarning, match="rounds"), pytest.raises(KeyboardInterrupt):
        train(half, tmp_path / "half", "merge", trainer={"callbacks": [Stop()]})
    with pytest.raises(RuntimeError, match="load the base again"):
        unload(half)
