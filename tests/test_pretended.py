"""The pretended CUDA device behaves as a GPU machine where it matters: which device, which precision, how many."""

import subprocess
import sys
import textwrap

import pytest

from tools.run_chapters import ROOT


def on_a_gpu(code: str, gpus: int = 1, bf16: bool = False) -> str:
    """What code prints in a process of its own; the device changes torch for good."""
    start = f"from tools.pretended.machine import pretend; pretend({gpus}, {bf16})\nimport torch\n"
    run = subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_devices_are_told_apart_and_refuse_to_be_mixed() -> None:
    printed = on_a_gpu(
        """
        layer = torch.nn.Linear(4, 4).to("cuda")
        x = torch.randn(2, 4, device="cuda")
        y = layer(x)
        y.sum().backward()
        print(y.device, layer.weight.grad.device, x.cpu().device, x.to("cpu") @ torch.ones(4, 1))
        for mixed in (lambda: layer(torch.randn(2, 4)), lambda: x + torch.randn(4), lambda: x.numpy()):
            try:
                mixed()
            except (RuntimeError, TypeError) as error:
                print("refused:", str(error)[:40])
        print(x + 1, x * torch.tensor(2.0))
        """
    )
    assert printed.count("refused:") == 3 and printed.startswith("cuda:0 cuda:0 cpu")


@pytest.mark.parametrize(("bf16", "expected"), [(False, "torch.float16"), (True, "torch.bfloat16")])
def test_precision_and_profile_are_those_of_the_gpu(bf16: bool, expected: str) -> None:
    code = """
    from lora_course import lab, arguments
    print(arguments.compute_dtype(), lab.pick_profile().name)
    with torch.autocast("cuda", arguments.compute_dtype()):
        print((torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")).dtype)
    """
    chosen, computed = on_a_gpu(code, bf16=bf16).splitlines()
    assert chosen == f"{expected} {'large' if bf16 else 't4'}" and computed == expected


def test_a_training_stays_where_its_model_is() -> None:
    """Fault 32: a model on the CPU of a GPU machine was moved by its training, and CPU rows met it there."""
    code = """
    from peft import LoraConfig
    from lora_course import inject, lab
    from lora_course.lab import study
    for device in ("cpu", "cuda"):
        model, tokenizer = lab.load_base("nano", device=device)
        inject(model, LoraConfig(r=2, target_modules=["q_proj"]))
        rows = lab.blocks(tokenizer, lab.load_text("shakespeare", "validation"), 32)
        losses = study.fit(model, rows, 1e-3, seed=0, steps=2, batch=2, disable_tqdm=True)
        batch = {key: value.to(device) for key, value in rows[:2].items()}
        print(model.device, model(**batch, use_cache=False).logits.device, len(losses))
    """
    lines = on_a_gpu(code, gpus=2).splitlines()
    assert [line for line in lines if line.startswith(("cpu", "cuda"))] == ["cpu cpu 2", "cuda:0 cuda:0 2"]  # fmt: skip


@pytest.mark.lane
@pytest.mark.parametrize(
    ("stem", "profile"), [("4_2_hierarchical", "tiny"), ("4_3_quantized", "t4")]
)
def test_a_chapter_runs_on_a_pretended_gpu(stem: str, profile: str) -> None:
    command = [sys.executable, "-m", "tools.pretended.chapters", stem, "--profile", profile]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
