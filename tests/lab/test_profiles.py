"""Profiles, the memory they are expected to take, and what is refused before it starts."""

import ast
import dataclasses
import json
import re

import pytest
import torch
from peft import LoraConfig

from lora_course.injection import inject, trainable_parameters
from lora_course.lab import profiles as module
from lora_course.lab.estimate import Shape
from lora_course.lab.memory import peak_memory, tensor_bytes
from lora_course.lab.models import NANO, load_base
from lora_course.lab.profiles import (
    GIB,
    estimate,
    needed_memory,
    pick_profile,
    preflight,
    profiles,
    usable_gpu,
)
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
    assert "7 steps of 2 × 64 tokens" in capsys.readouterr().out


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


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("batch", "length"), [(4, 64), (2, 256)])
def test_the_estimate_agrees_with_a_measured_step(batch, length, checkpointing) -> None:
    model, _ = load_base("nano")
    inject(model, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(0, 4096, (batch, length), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    stored = tensor_bytes(model)
    peak = stored + peak_memory(step)[1]
    profile = dataclasses.replace(
        profiles()["tiny"], batch=batch, length=length, gradient_checkpointing=checkpointing
    )
    expected = estimate(profile)
    assert stored == pytest.approx(expected.weights + expected.adapters, rel=0.01)
    measured_step, expected_step = (
        peak - stored,
        expected.total - expected.weights - expected.adapters,
    )
    assert measured_step / WITHIN < expected_step < measured_step * WITHIN


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
    run = {"minutes": 2.04, "peak_gib": 0.7}
    record = {"device": "a laptop", "date": "2026-01-02", "chapters": {"0_1_lora": run}}
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny.json").write_text(json.dumps(record))
    preflight(profiles()["tiny"], {"tiny": 1.5}, chapter="0_1_lora")
    shown = capsys.readouterr().out
    assert "0.7 GiB (measured)" in shown
    assert "2 min, as measured on a laptop, 2026-01-02\n" in shown
    preflight(profiles()["tiny"], {"tiny": 1.5}, chapter="1_1_qlora")
    assert "a guess" in capsys.readouterr().out


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
def test_a_chapter_fits_the_gpus_that_its_profiles_are_for(chapter) -> None:
    """`t4` on a T4 and `large` on an L4, with all the bases that the chapter announces, as set-up says."""
    found = re.search(r"(?:at_once = |copies=)(\{.*?\})", chapter.read_text())
    copies = ast.literal_eval(found[1]) if found else 1
    for name, free in (("t4", 14.5), ("large", 22)):
        assert needed_memory(pick_profile(name, copies=copies)) < free * GIB, name
