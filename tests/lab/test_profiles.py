"""Profiles, the memory they are expected to take, and what is refused before it starts."""

import ast
import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jupytext
import pytest
import torch
from peft import LoraConfig

from lora_course import experts
from lora_course.distillation import Teachers, distillation_step
from lora_course.injection import inject, trainable_parameters
from lora_course.lab import profiles as module
from lora_course.lab import study
from lora_course.lab.estimate import Shape
from lora_course.lab.memory import peak_memory, tensor_bytes
from lora_course.lab.models import NANO, load_base
from lora_course.lab.profiles import (
    GIB,
    Profile,
    estimate,
    needed_memory,
    pick_profile,
    preflight,
    profiles,
    usable_gpu,
)
from lora_course.states import factor_state
from tools.chapters import chapters

WITHIN = 1.15  # the factor that estimate and measurement may differ by


@pytest.fixture(autouse=True)
def _no_profile_set(monkeypatch) -> None:
    monkeypatch.delenv("LORA_COURSE_PROFILE", raising=False)


def gpu(monkeypatch, free: float, bf16: bool = True, capability: tuple = (8, 0)) -> None:
    """Makes this machine one with a GPU of so many free GiB, and torch a build of today's CUDA."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "sm_120"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: bf16 or including_emulation,
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * GIB), int(80 * GIB)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


@pytest.mark.parametrize(
    ("free", "bf16", "name"),
    [
        (139, True, "large"),  # H200
        (79, True, "large"),  # A100 or H100 with 80 GB
        (39, True, "large"),  # A100 with 40 GB
        (22, True, "large"),  # L4
        (14.7, False, "t4"),  # T4
        (9, True, "t4"),
        (1, True, "tiny"),
    ],
)
def test_a_gpu_is_given_the_largest_profile_that_suits_it(monkeypatch, free, bf16, name) -> None:
    gpu(monkeypatch, free, bf16)
    profile = pick_profile()
    assert profile.name == name
    assert name == "tiny" or profile.dtype == (torch.bfloat16 if bf16 else torch.float16)


def test_bases_held_at_once_count(monkeypatch) -> None:
    gpu(monkeypatch, free=22)
    assert pick_profile().name == "large" and pick_profile(copies=3).name == "t4"
    gpu(monkeypatch, free=39)
    assert pick_profile(copies=3).name == "large" and pick_profile(copies=3).copies == 3
    one, three = (pick_profile("large", copies=n) for n in (1, 3))
    weights = estimate(one).weights + estimate(one).adapters
    assert needed_memory(three) - needed_memory(one) == 2 * weights
    by_name = {name: pick_profile(name, copies={"t4": 3}).copies for name in profiles()}
    assert by_name == {"tiny": 1, "smol": 1, "t4": 3, "large": 1}


def test_a_chapters_amounts_are_announced_and_counted(capsys) -> None:
    settings = {"steps": 7, "batch": 2, "length": 64, "seeds": [0, 1]}
    profile = pick_profile("tiny", training=settings)
    assert (profile.steps, profile.batch, profile.length) == (7, 2, 64)
    assert needed_memory(profile) < needed_memory(pick_profile("tiny"))
    preflight(profile, {"tiny": 1})
    assert "7 steps of 2 × 64 tokens, one seed\n" in capsys.readouterr().out
    preflight(profile, {"tiny": 1}, seeds=3)
    assert "7 steps of 2 × 64 tokens, 3 seeds\n" in capsys.readouterr().out


def test_a_gpu_without_kernels_in_this_torch_is_none(monkeypatch) -> None:
    gpu(monkeypatch, 15, bf16=False, capability=(6, 0))  # P100
    assert not usable_gpu() and pick_profile().name == "tiny"
    with pytest.raises(RuntimeError, match="T4, not P100"):
        preflight(profiles()["t4"], {"t4": 3})
    for capability, usable in {(7, 5): True, (8, 9): True, (9, 0): True, (10, 0): False}.items():
        gpu(monkeypatch, 15, capability=capability)
        assert usable_gpu() == usable, capability
    for names, usable in {
        ("sm_90a",): True,
        ("compute_90",): True,
        ("gfx942", "gfx90a"): False,
    }.items():
        gpu(monkeypatch, 15, capability=(9, 4))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: names)
        assert usable_gpu() == usable, names


def test_without_a_gpu_it_is_tiny_unless_the_environment_names_another(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_profile().name == "tiny"
    monkeypatch.setenv("LORA_COURSE_PROFILE", "smol")
    assert pick_profile().name == "smol"
    assert pick_profile("tiny").name == "tiny"
    monkeypatch.setenv("LORA_COURSE_PROFILE", "huge")
    with pytest.raises(ValueError, match="'huge'.*tiny, smol, t4, large"):
        pick_profile()


def test_shapes_of_the_profiles_count_the_parameters_of_their_models() -> None:
    tiny, smol, t4, large = (profiles()[name].shape for name in ("tiny", "smol", "t4", "large"))
    model, _ = load_base("nano")
    ours = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert tiny.linear + tiny.embedding == ours
    assert trainable_parameters(
        inject(model, LoraConfig(r=3, lora_alpha=3, target_modules="all-linear"))
    ) == tiny.adapter(3)
    assert Shape.from_config(model.config.to_dict()) == tiny
    # published sizes: 134.5M, 494M and 7.62B, with norms and biases
    assert smol.linear + smol.embedding == pytest.approx(134.5e6, rel=0.001)
    assert t4.linear + t4.embedding == pytest.approx(494e6, rel=0.001)
    assert large.linear + large.embedding == pytest.approx(7.616e9, rel=0.001)


def step_of(kind: str, model, ids) -> Callable[[], None]:
    """One training step of LoRA of rank 8 in all on the linear layers, with the loss of its kind."""
    rows = {"input_ids": ids, "labels": ids}
    config = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
    if kind == "router":
        config.r = 2
        inject(model, config, experts.ExpertsLinear, num_experts=4)
    else:
        config.lora_dropout = 0.1 if kind == "dropout" else 0.0
        inject(model, config)
    teachers = Teachers(model, {"one": factor_state(model), "two": factor_state(model)}) if kind == "distillation" else None  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad])

    def step() -> None:
        if teachers:
            loss = distillation_step(teachers, rows).loss
        else:
            loss = model(**rows, use_cache=False).loss
        loss.backward()  # by now no name holds the logits, as in a Trainer
        optimizer.step()

    return step


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(4, 64), (2, 256)])
@pytest.mark.parametrize(
    ("kind", "announced"),
    [
        ("plain", {}),
        ("distillation", {"more_logits": 4}),  # as chapter 3.2 announces
        ("router", {}),
        ("dropout", {"lora_dropout": 0.1}),
    ],
)
def test_the_estimate_agrees_with_a_measured_step(
    kind, announced, batch, length, checkpointing
) -> None:
    model, _ = load_base("nano")
    ids = torch.randint(0, 4096, (batch, length), generator=torch.Generator().manual_seed(0))
    step = step_of(kind, model, ids)
    if checkpointing:
        model.gradient_checkpointing_enable()
    stored = tensor_bytes(model)
    measured = peak_memory(step)[1]
    profile = dataclasses.replace(
        pick_profile("tiny", training={"batch": batch, "length": length, **announced}),
        gradient_checkpointing=checkpointing,
    )
    expected = estimate(profile)
    assert stored == pytest.approx(expected.weights + expected.adapters, rel=0.01)
    expected_step = expected.total - expected.weights - expected.adapters
    assert measured / WITHIN < expected_step < measured * WITHIN


@cache
def announcing(chapter: Path) -> tuple[list[ast.stmt], dict[str, Any]]:
    """The statements of the cell in which a chapter picks its profile, past its imports, and the names that these need."""
    cells = [cell.source for cell in jupytext.read(chapter).cells if cell.cell_type == "code"]
    (cell,) = [source for source in cells if "lab.pick_profile(" in source]
    body = [s for s in ast.parse(cell).body if not isinstance(s, ast.Import | ast.ImportFrom)]
    end = next(i for i, s in enumerate(body) if "lab.preflight(" in ast.unparse(s))
    return body[: end + 1], {"study": study}


def announced(chapter: Path, name: str, monkeypatch) -> tuple[Profile, list[Any]]:
    """The profile that a chapter announces where it is told to run under `name`, and each `training` it picks it with."""
    monkeypatch.setenv("LORA_COURSE_PROFILE", name)
    given, shown = [], []

    def pick(name: str | None = None, **how: Any) -> Profile:
        given.append(how["training"])
        return pick_profile(name, **how)

    def show(profile: Profile, minutes: dict, **how: Any) -> None:
        assert profile.name in minutes and how == {"chapter": chapter.stem}  # so one seed
        shown.append(profile)

    body, names = announcing(chapter)
    lab = SimpleNamespace(pick_profile=pick, preflight=show)
    exec(compile(ast.Module(body, []), chapter.name, "exec"), {**names, "lab": lab})
    (profile,) = shown
    return profile, given


@pytest.mark.parametrize("chapter", chapters(), ids=lambda path: path.stem)
def test_a_chapter_announces_steps_batch_and_length_of_its_own(chapter, monkeypatch) -> None:
    for name in ("tiny", "t4", "large"):
        profile, given = announced(chapter, name, monkeypatch)
        for training in given:
            amounts = {key: training.get(key) for key in ("steps", "batch", "length")}
            assert all(isinstance(amount, int) for amount in amounts.values()), amounts
            assert amounts == {key: getattr(profile, key) for key in amounts}


@pytest.mark.parametrize("chapter", chapters(), ids=lambda path: path.stem)
def test_no_training_of_a_chapter_is_repeated_with_other_seeds(chapter) -> None:
    """So preflight's "one seed" is true; shown scripts, which are no cells, may."""
    for cell in jupytext.read(chapter).cells:
        if cell.cell_type != "code":
            continue
        for loop in ast.walk(ast.parse(cell.source)):
            if isinstance(loop, ast.For) and "seed" in ast.unparse(loop.target):
                calls = {ast.unparse(n.func) for n in ast.walk(loop) if isinstance(n, ast.Call)}
                assert not [c for c in calls if c.endswith(("fit", ".train", "train_stages"))], (
                    calls
                )


def test_distillation_holds_more_than_plain_lora_and_its_chapter_says_so(monkeypatch) -> None:
    (chapter,) = [path for path in chapters() if path.stem == "3_2_distillation"]
    profile, _ = announced(chapter, "t4", monkeypatch)
    tokens = profile.batch * profile.length
    plain = dataclasses.replace(profile, more_logits=0)
    sets = (needed_memory(profile) - needed_memory(plain)) / (4 * tokens * profile.shape.vocabulary)
    memory = study.load_study("3_2_distillation")["runs"]["memory"]["step_peak_bytes"]
    one_set = 4 * 8 * 128 * profiles()["tiny"].shape.vocabulary  # the record's batch and length
    assert sets == round((memory["2 teachers"] - memory["data alone"]) / one_set)


def test_four_bits_shrink_the_linear_layers_only() -> None:
    large = profiles()["large"]
    plain = dataclasses.replace(large, quantize=False, dtype=torch.float32)
    saved = estimate(plain).total - estimate(large).total
    assert saved == pytest.approx(large.shape.linear * (32 - 4.127) / 8, rel=1e-6)


def test_preflight_prints_what_it_will_take(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(module, "free_memory", lambda device: 8 * GIB)
    monkeypatch.setattr(module, "DATA", tmp_path)
    (tmp_path / "nano").symlink_to(NANO)
    preflight(profiles()["tiny"], {"tiny": 1.5, "t4": 3}, chapter="0_1_lora")
    shown = capsys.readouterr().out
    for part in (
        "tiny",
        "nano, 4.0M parameters, fp32",
        "cpu",
        "60 steps of 8 × 128 tokens",
        "takes about   1.5 min (a guess)\n",
        "estimated",
        "free: 8.0 GiB",
    ):
        assert part in shown
    recorded(tmp_path, "tiny", "a laptop", minutes=2.04, peak_gib=0.7)
    preflight(profiles()["tiny"], {"tiny": 1.5}, chapter="0_1_lora")
    shown = capsys.readouterr().out
    assert "2 min, as measured on a laptop, 2026-01-02\n" in shown
    assert "estimated" in shown and "0.7 GiB" not in shown  # of another device
    preflight(profiles()["tiny"], {"tiny": 1.5}, chapter="1_1_qlora")
    assert "a guess" in capsys.readouterr().out


def recorded(data: Path, profile: str, device: str, form: str | None = "now", **run: Any) -> None:
    """Writes a record of chapter 0.1 where `preflight` looks, beside the chapter's form as it is now."""
    (data / "forms.json").write_text(json.dumps({"0_1_lora": "now"}))
    (data / "runs").mkdir(exist_ok=True)
    run |= {} if form is None else {"form": form}
    record = {"device": device, "date": "2026-01-02", "chapters": {"0_1_lora": run}}
    (data / "runs" / f"{profile}.json").write_text(json.dumps(record))


@pytest.mark.parametrize("form", ["before", None])
def test_minutes_of_a_chapter_that_has_changed_are_not_as_measured(
    form, monkeypatch, capsys, tmp_path
) -> None:
    monkeypatch.setattr(module, "DATA", tmp_path)
    (tmp_path / "nano").symlink_to(NANO)
    recorded(tmp_path, "tiny", "a laptop", form, minutes=2.04)
    preflight(profiles()["tiny"], {"tiny": 1.5}, chapter="0_1_lora")
    shown = capsys.readouterr().out
    assert "as measured" not in shown
    assert "2 min, measured on a laptop, 2026-01-02 (of an earlier form)\n" in shown


@pytest.mark.parametrize(
    ("device", "form", "peak", "shown"),
    [
        ("NVIDIA H200", "now", 31.0, "estimated"),
        ("a GPU", "before", 31.0, "estimated"),
        ("a GPU", "now", 31.0, "31.0 GiB (measured)"),
        ("a GPU", "now", 12.0, "12.0 GiB (measured)"),
    ],
)
def test_what_was_picked_is_not_refused(
    device, form, peak, shown, monkeypatch, capsys, tmp_path
) -> None:
    """A peak counts what the allocator keeps, and that grows with the GPU: it is no need of another one."""
    monkeypatch.setattr(module, "DATA", tmp_path)
    (tmp_path / "nano").symlink_to(NANO)
    for name in ("large", "t4"):
        recorded(tmp_path, name, device, form, minutes=9.0, peak_gib=peak)
    for free in (22, 9):
        gpu(monkeypatch, free)
        preflight(pick_profile(), {"large": 25, "t4": 8}, chapter="0_1_lora")
        assert shown in capsys.readouterr().out


def test_a_peak_measured_here_lets_run_what_the_estimate_would_refuse(
    monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(module, "DATA", tmp_path)
    (tmp_path / "nano").symlink_to(NANO)
    gpu(monkeypatch, free=5)
    recorded(tmp_path, "large", "a GPU", minutes=9.0, peak_gib=4.5)
    preflight(profiles()["large"], {"large": 25}, chapter="0_1_lora")
    recorded(tmp_path, "large", "a smaller GPU", minutes=9.0, peak_gib=4.5)
    with pytest.raises(RuntimeError, match="'large' needs about"):
        preflight(profiles()["large"], {"large": 25}, chapter="0_1_lora")


def test_what_is_refused_names_the_profiles_that_fit(monkeypatch) -> None:
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB))
    gpu(monkeypatch, free=9)
    with pytest.raises(RuntimeError, match=r"one that fits \(tiny, smol, t4\)"):
        preflight(pick_profile("large"), {"large": 25})
    with pytest.raises(RuntimeError, match=r"one that fits \(tiny, smol\)"):
        preflight(pick_profile("large", copies={"t4": 9}), {"large": 25})
    gpu(monkeypatch, free=1)
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    with pytest.raises(RuntimeError, match=r"hold memory$"):
        preflight(pick_profile("large"), {"large": 25})


def test_preflight_refuses_what_does_not_fit_after_showing_why(monkeypatch, capsys) -> None:
    gpu(monkeypatch, free=5)
    with pytest.raises(
        RuntimeError,
        match=r"'large' needs about .* GiB and a GPU has 5.0 GiB free.*LORA_COURSE_PROFILE",
    ):
        preflight(profiles()["large"], {"large": 60})
    assert "free: 5.0 GiB" in capsys.readouterr().out
    assert needed_memory(profiles()["t4"]) > estimate(profiles()["t4"]).total  # CUDA's own share


def test_preflight_refuses_a_missing_device_and_a_profile_without_minutes(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="'t4' needs an NVIDIA GPU.*LORA_COURSE_PROFILE=tiny"):
        preflight(profiles()["t4"], {"t4": 3})
    with pytest.raises(ValueError, match="'tiny'; it has t4"):
        preflight(profiles()["tiny"], {"t4": 3})


@pytest.mark.parametrize("chapter", chapters(), ids=lambda path: path.stem)
def test_a_chapter_fits_the_gpus_that_its_profiles_are_for(chapter, monkeypatch) -> None:
    """`t4` on a T4 and `large` on an L4, with all that the chapter announces, as set-up says."""
    for name, free in (("t4", 14.5), ("large", 22)):
        profile, _ = announced(chapter, name, monkeypatch)
        assert needed_memory(profile) < free * GIB, name
