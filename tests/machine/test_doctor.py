"""`lora-course doctor` says what is here, what runs, and what to paste."""

import pytest
import torch

from lora_course import cli
from lora_course.lab import profiles
from lora_course.machine import environment


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    found = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line]
    return {name: rest for name, rest in found}


def test_without_a_gpu_it_names_the_profiles_that_run(capsys, monkeypatch) -> None:
    monkeypatch.delenv("LORA_COURSE_PROFILE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(profiles, "free_memory", lambda device: 2 * profiles.GIB)
    assert cli.main(["doctor"]) == 0
    said = lines(capsys)
    assert said["tiny"].startswith("runs on the cpu") and "chapters choose" in said["tiny"]
    assert said["t4"] == said["large"] == "needs an NVIDIA GPU"
    assert torch.__version__ in said["packages"] and "none that torch sees" in said["GPU"]
    monkeypatch.setattr(profiles, "free_memory", lambda device: profiles.GIB // 2)
    assert cli.main(["doctor"]) == 0 and lines(capsys)["smol"].startswith("does not fit")


def test_a_gpu_that_torch_has_no_kernels_for_is_said(capsys, monkeypatch) -> None:
    answers = {
        "is_available": True,
        "get_device_name": "a P100",
        "mem_get_info": (profiles.GIB,) * 2,
    }
    answers |= {"get_device_capability": (6, 0), "get_arch_list": ["sm_75"], "device_count": 1}
    answers["is_bf16_supported"] = False
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    assert cli.main(["doctor"]) == 0
    said = lines(capsys)
    assert "no kernels" in said["GPU"] and said["t4"] == "needs an NVIDIA GPU"


def test_what_peft_refuses_is_to_be_mended(capsys, monkeypatch) -> None:
    versions = environment.installed() | {"torchao": "0.10.0"}
    monkeypatch.setattr(environment, "installed", lambda: versions)
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "torchao>=0.16.0 is missing, too old" in printed
    assert 'python -m pip install --upgrade "torchao<0.17,>=0.16.0"' in printed
    assert "'" not in printed  # it quotes nothing in cmd.exe, where < reads a file
