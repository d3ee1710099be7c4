"""AdapterTrainer: the same steps as a loop by hand, small checkpoints, and the same weights after a kill."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import TrainerCallback

from lora_course import training
from lora_course.arguments import compute_dtype, training_arguments
from lora_course.injection import adapter_layers, merge
from lora_course.qlora import load_4bit, quantize_model
from lora_course.runs import COMPLETE, last_checkpoint
from lora_course.states import adapter_state
from lora_course.training import AdapterTrainer
from tests.half_nano import MODEL, NANO, arguments, injected, rows
from tests.processes import run_until_shot, shot

pytestmark = pytest.mark.usefixtures("one_thread")


def penalty(model: torch.nn.Module) -> torch.Tensor:
    """A regulariser on the factors that is far from zero."""
    return 0.3 * sum(((layer.A @ layer.A.T) ** 2).sum() for layer in adapter_layers(model).values())


def assert_same(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0
) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name],
            other[name],
            rtol=0,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


# --- the steps it takes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auxiliary", [None, penalty])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_training_equals_a_loop_by_hand(tmp_path: Path, accumulation: int, auxiliary) -> None:
    data = rows(4 * 2 * accumulation, ragged=True)
    model = injected()
    args = arguments(
        tmp_path, max_steps=4, gradient_accumulation_steps=accumulation, lr_scheduler_type="constant", warmup_steps=0,
        weight_decay=0.1, learning_rate=1e-3,
    )  # fmt: skip
    trainer = AdapterTrainer(model, args, train_dataset=data, auxiliary_loss=auxiliary)
    batches = [batch for batch in trainer.get_train_dataloader()]
    trainer.train()

    reference = injected().train()
    parameters = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)
    history = []
    for step in range(4):
        micro = batches[step * accumulation : (step + 1) * accumulation]
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in micro)
        total = 0.0
        for batch in micro:
            logits = reference(input_ids=batch["input_ids"]).logits[:, :-1]
            labels = batch["labels"][:, 1:].flatten()
            total += (
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
                / tokens
            )
        total += auxiliary(reference) if auxiliary else 0
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(total.item())
    assert_same(adapter_state(model), adapter_state(reference), 1e-6)
    assert [entry["loss"] for entry in trainer.history] == pytest.approx(history, abs=1e-4)


def test_the_auxiliary_loss_counts_once_a_step_however_the_batch_is_cut(tmp_path: Path) -> None:
    states, losses = [], []
    for batch, accumulation in [(8, 1), (2, 4)]:
        args = arguments(
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=0,
        )
        model = injected()
        trainer = AdapterTrainer(
            model, args, train_dataset=rows(24, ragged=True), auxiliary_loss=penalty
        )
        trainer.train()
        states.append(adapter_state(model))
        losses.append([entry["loss"] for entry in trainer.history])
    assert_same(*states, tolerance=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    without = injected()
    AdapterTrainer(without, args, train_dataset=rows(24, ragged=True)).train()
    assert difference(adapter_state(without), states[0]) > 1e-3


def test_evaluation_leaves_the_auxiliary_loss_out(tmp_path: Path) -> None:
    data, args = rows(8), arguments(tmp_path)
    plain = AdapterTrainer(injected(), args, eval_dataset=data).evaluate()["eval_loss"]
    assert (
        AdapterTrainer(injected(), args, eval_dataset=data, auxiliary_loss=penalty).evaluate()[
            "eval_loss"
        ]
        == plain
    )


def test_a_finished_run_that_is_taken_over_evaluates_as_it_did_after_training(
    tmp_path: Path,
) -> None:
    args = arguments(tmp_path, bf16=True, save_strategy="steps", save_steps=3)
    losses = []
    for _ in range(2):  # trains; takes the finished run over
        trainer = AdapterTrainer(injected(), args, train_dataset=rows(), eval_dataset=rows(8))
        trainer.train(resume_from_checkpoint=True)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


def test_the_seed_decides_the_run_and_nothing_that_was_drawn_before(tmp_path: Path) -> None:
    def run(seed: int, drawn: int) -> dict[str, torch.Tensor]:
        model = injected(dropout=0.3)
        trainer = AdapterTrainer(model, arguments(tmp_path, seed=seed), train_dataset=rows())
        torch.rand(drawn)
        trainer.train()
        return adapter_state(model)

    first = run(0, 1)
    assert_same(first, run(0, 7))
    assert difference(first, run(1, 1)) > 1e-4


def test_gradient_checkpointing_gives_the_same_weights(tmp_path: Path) -> None:
    states = []
    for checkpointing in (False, True):
        model = injected(dropout=0.2)
        trainer = AdapterTrainer(
            model, arguments(tmp_path, gradient_checkpointing=checkpointing), train_dataset=rows()
        )
        trainer.train()
        states.append(adapter_state(model))
        assert model.is_gradient_checkpointing == checkpointing
    assert_same(*states, tolerance=1e-6)
    assert difference(states[0], adapter_state(injected(dropout=0.2))) > 1e-3


# --- the model it takes and gives back ----------------------------------------------------------------------------------


def test_a_model_without_adapters_and_a_merged_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"inject\(model, config\)"):
        AdapterTrainer(copy.deepcopy(MODEL), arguments(tmp_path), train_dataset=rows())
    with pytest.raises(ValueError, match="q_proj' is merged.*unmerge"):
        AdapterTrainer(merge(injected()), arguments(tmp_path), train_dataset=rows())


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded in 4 bits", "quantised in memory"])
def test_a_4bit_base_is_trained_and_its_bytes_stay(tmp_path: Path, loaded: bool) -> None:
    base = (
        load_4bit(NANO, compute_dtype=torch.float32)
        if loaded
        else quantize_model(copy.deepcopy(MODEL))
    )
    model = injected(model=base)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    first = adapter_state(model)
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    trainer = AdapterTrainer(model, args, train_dataset=rows())
    trainer.train()
    assert difference(adapter_state(model), first) > 1e-3
    after = dict(model.named_parameters())
    assert any(p.dtype == torch.uint8 for p in before.values())
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert last_checkpoint(tmp_path).name == "checkpoint-4"


def test_the_base_is_bit_equal_and_without_gradient(tmp_path: Path) -> None:
    model = injected()
    AdapterTrainer(model, arguments(tmp_path), train_dataset=rows()).train()
    for name, p in MODEL.named_parameters():
        ours = dict(model.named_parameters())
        same = ours.get(name, ours.get(name.replace("_proj.", "_proj.base_layer.")))
        assert torch.equal(same, p) and same.grad is None and not same.requires_grad


def test_the_model_comes_back_without_autocast_and_with_its_cache(tmp_path: Path) -> None:
    model = injected()
    ids = rows(1)[0]["input_ids"][None]
    args = arguments(tmp_path, bf16=True, max_steps=2)
    AdapterTrainer(model, args, train_dataset=rows()).train()
    assert "forward" not in vars(model)
    assert model.config.use_cache is True
    logits = model.eval()(input_ids=ids).logits
    # fp32 logits are not all representable in bf16, as they would be had autocast computed them
    assert not torch.equal(logits, logits.bfloat16().float())


def test_each_training_of_one_model_has_its_own_precision(tmp_path: Path) -> None:
    """accelerate wraps a model only once: without care a second training would run in the first one's precision."""

    def run(*precisions: bool) -> list[dict[str, torch.Tensor]]:
        model, states = injected(), []
        for bf16 in precisions:
            for layer, start in zip(
                adapter_layers(model).values(), adapter_layers(injected()).values(), strict=True
            ):
                layer.load_tensors(start.tensors())
            AdapterTrainer(
                model, arguments(tmp_path, bf16=bf16, max_steps=2), train_dataset=rows()
            ).train()
            states.append(adapter_state(model))
        return states

    (full,), (half,) = run(False), run(True)
    assert difference(full, half) > 0
    after_half, after_full = run(True, False)[1], run(False, True)[1]
    assert_same(after_half, full)
    assert_same(after_full, half)


# --- checkpoints --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_adapter_and_no_base(tmp_path: Path) -> None:
    model = injected()
    AdapterTrainer(
        model, arguments(tmp_path, save_strategy="steps", save_steps=6), train_dataset=rows()
    ).train()
    folder = last_checkpoint(tmp_path)
    with safe_open(folder / "adapter.safetensors", "pt") as saved:
        assert set(saved.keys()) == set(adapter_state(model))
    adapter = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert adapter * 3 < size < adapter * 3 + 100_000  # the adapter, two moments, and small change
    assert {path.name for path in folder.iterdir()} == {
        "adapter.json", "adapter.safetensors", COMPLETE, "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json",
    }  # fmt: skip


class Kill(TrainerCallback):
    """Kills its own process in the middle of the eighth step, between two micro-batches."""

    def on_substep_end(self, args, state, control, **_) -> None:
        if state.global_step == 7:
            shot()


def run_to_the_end(folder: Path, kill: bool = False) -> dict[str, torch.Tensor]:
    """The command that is repeated after a kill; 14 steps of 4 over 24 rows are three epochs."""
    model = injected(dropout=0.2)
    args = arguments(
        folder,
        max_steps=14,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=1,
    )
    trainer = AdapterTrainer(
        model,
        args,
        train_dataset=rows(),
        auxiliary_loss=penalty,
        callbacks=[Kill()] if kill else None,
    )
    trainer.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in trainer.history] == list(range(1, 15))
    (folder / "history.json").write_text(json.dumps(trainer.history))
    return adapter_state(model)


def test_after_a_kill_the_same_command_reaches_the_same_weights(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    expected = run_to_the_end(straight)

    run_until_shot("tests.test_training", f"run_to_the_end(Path({str(killed)!r}), kill=True)")
    assert last_checkpoint(killed).name == "checkpoint-6"
    assert_same(run_to_the_end(killed), expected)
    assert (killed / "history.json").read_text() == (straight / "history.json").read_text()


def test_a_checkpoint_cut_short_is_passed_over_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_) -> None:
        raise Killed

    (tmp_path / "straight").mkdir()
    expected = run_to_the_end(tmp_path / "straight")
    for owner, part in (
        (AdapterTrainer, "_save_optimizer_and_scheduler"),
        (training, "mark_complete"),
        (training, "rotate_checkpoints"),
    ):
        folder = tmp_path / part
        folder.mkdir()
        saved = getattr(owner, part)
        count = iter(range(100))
        with monkeypatch.context() as patch:
            patch.setattr(
                owner,
                part,
                lambda *a, saved=saved, count=count, **k: (
                    saved(*a, **k) if next(count) < 2 else killed()
                ),
            )
            with pytest.raises(Killed):
                run_to_the_end(folder)
        complete = part == "rotate_checkpoints"  # by then the new one is written to its end
        if complete:
            assert last_checkpoint(folder).name == "checkpoint-9"
        else:
            with pytest.warns(UserWarning, match="checkpoint-9 was not written to its end"):
                assert last_checkpoint(folder).name == "checkpoint-6"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_same(run_to_the_end(folder), expected)


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    expected = run_to_the_end(tmp_path)
    files = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.glob("checkpoint-*/*"))
    assert_same(run_to_the_end(tmp_path), expected)
    assert (
        sorted((path, path.stat().st_mtime_ns) for path in tmp_path.glob("checkpoint-*/*")) == files
    )


def test_the_last_checkpoint_is_the_last_written_not_the_one_of_most_steps(tmp_path: Path) -> None:
    long, short = (
        arguments(tmp_path, max_steps=n, save_strategy="steps", save_steps=n, save_total_limit=None)
        for n in (4, 2)
    )
    for args in (long, short):
        AdapterTrainer(injected(), args, train_dataset=rows()).train()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_only_so_many_checkpoints_are_kept(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=2)
    AdapterTrainer(injected(), args, train_dataset=rows()).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-5",
    ]


def test_a_folder_that_is_no_complete_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer = AdapterTrainer(injected(), arguments(tmp_path), train_dataset=rows())
    with pytest.raises(FileNotFoundError, match=f"checkpoint-3.*{COMPLETE}"):
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-3")


@pytest.mark.parametrize("folder", [".", "./out"])
def test_the_best_adapter_is_kept_and_brought_back_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """Best is here the one of greatest loss, which is the first, so that the last is not it."""
    monkeypatch.chdir(tmp_path)
    args = arguments(
        folder, max_steps=4, warmup_steps=0, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, greater_is_better=True, save_total_limit=2,
    )  # fmt: skip
    data = rows(8)
    trainer = AdapterTrainer(injected(), args, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(losses) == losses[0] > losses[-1] + 1e-3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], abs=1e-5)


# --- what it shows ------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_shown_as_such(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=3)
    trainer = AdapterTrainer(
        injected(),
        args,
        train_dataset=rows(),
        auxiliary_loss=lambda model: penalty(model) * float("nan"),
    )
    trainer.train()
    assert all(entry["loss"] != entry["loss"] for entry in trainer.history)


@pytest.mark.parametrize(
    ("avx512", "amx", "dtype"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
)
def test_a_cpu_computes_in_bf16_only_where_its_hardware_does(
    monkeypatch, tmp_path, avx512, amx, dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert compute_dtype("cpu") == dtype
    assert training_arguments(tmp_path, device="cpu").bf16 == (dtype == torch.bfloat16)


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_without_bf16_computes_in_fp16(monkeypatch, native, dtype) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # a T4 claims bf16 unless emulation is left out
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: native or including_emulation,
    )
    assert compute_dtype() == compute_dtype("cuda:0") == dtype


def test_without_progress_nothing_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AdapterTrainer(injected(), arguments(tmp_path, max_steps=2), train_dataset=rows()).train()
    assert capsys.readouterr().out == ""  # transformers prints each logged step in place of its bar
