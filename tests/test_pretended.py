"""The pretended CUDA device behaves as a GPU machine where it matters: which device, which precision, how many."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jupytext
import pytest

from tests.processes import run
from tools.chapters import ROOT, chapters
from tools.pretended.live import changed, live, read_all


def on_a_gpu(code: str, gpus: int = 1, bf16: bool = False) -> str:
    """What code prints in a process of its own; the device changes torch for good."""
    start = f"from tools.pretended.machine import pretend; pretend({gpus}, {bf16})\nimport torch\n"
    process = run(start + textwrap.dedent(code))
    assert process.returncode == 0, process.stderr
    return process.stdout


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
        print(x + 1, x * torch.tensor(2.0), f"{x.norm():.1e}")
        print("numbers", x.shape.numel(), torch.zeros(3, 5, device="cuda").shape.numel())
        """
    )
    assert printed.count("refused:") == 3 and printed.startswith("cuda:0 cuda:0 cpu")
    assert "numbers 8 15" in printed


def test_a_backward_pass_makes_tensors_on_the_device() -> None:
    printed = on_a_gpu(
        """
        class Doubled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return 2 * x

            @staticmethod
            def backward(ctx, gradient):
                (x,) = ctx.saved_tensors
                return gradient @ (2 * torch.eye(3, device=x.device))

        x = torch.ones(2, 3, device="cuda").requires_grad_()
        Doubled.apply(x).sum().backward()
        print(x.grad.device, x.grad.sum().item())
        """
    )
    assert printed == "cuda:0 12.0\n"


def test_a_model_with_parts_on_two_devices_and_in_four_bits_is_copied_as_on_a_gpu() -> None:
    printed = on_a_gpu(
        """
        import copy
        from lora_course import lab, qlora
        four = qlora.load_4bit(lab.base_path("nano"), compute_dtype=torch.float32, gradient_checkpointing=False)
        both = torch.nn.ModuleDict({"there": four, "here": torch.nn.BatchNorm1d(4)})
        copied = copy.deepcopy(both)
        ids = torch.tensor([[5, 6, 7]], device="cuda")
        with torch.no_grad():
            apart = (copied["there"](ids).logits - four(ids).logits).abs().max()
        layer = copied["there"].model.layers[0].mlp.up_proj
        print(layer.weight.device, copied["here"].running_mean.device, copied["here"].weight.device, apart.item())
        print(layer.weight.data_ptr() != four.model.layers[0].mlp.up_proj.weight.data_ptr())
        """
    )
    assert printed.splitlines()[-2:] == ["cuda:0 cpu cpu 0.0", "True"]


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


def test_an_adapter_merges_into_a_base_on_the_device() -> None:
    code = """
    from peft import LoraConfig
    from lora_course import adapter_layers, inject, lab, merge
    model, _ = lab.load_base("nano", torch.float16, "cuda")
    layers = adapter_layers(inject(model, LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"])))
    for layer in layers.values():
        torch.nn.init.ones_(layer.B)
    before = {name: layer.base_layer.weight.clone() for name, layer in layers.items()}
    merge(model)
    print(all((layer.base_layer.weight != before[name]).any() for name, layer in layers.items()), model.device)
    """
    assert on_a_gpu(code) == "True cuda:0\n"


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


def test_what_trains_on_the_device_takes_corners_and_on_the_cpu_whole_batches_unless_told() -> None:
    code = """
    from peft import LoraConfig
    from lora_course import inject, lab
    from lora_course.lab import study
    from tools.pretended.chapters import train_on_corners
    asked = iter([False, False, True, True])
    train_on_corners(on_cpu=lambda: next(asked))
    for device in ("cpu", "cuda", "cpu"):
        model, tokenizer = lab.load_base("nano", device=device)
        inject(model, LoraConfig(r=2, target_modules=["q_proj"]))
        seen = []
        model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
        rows = lab.blocks(tokenizer, lab.load_text("shakespeare", "validation"), 32)
        losses = study.fit(model, rows, 1e-3, seed=0, steps=2, batch=4, disable_tqdm=True)
        print(device, seen, len(losses))
    """
    lines = on_a_gpu(code).splitlines()
    assert [line for line in lines if line.startswith(("cpu", "cuda"))] == [
        "cpu [(4, 32), (4, 32)] 2", "cuda [(2, 24), (2, 24)] 2", "cpu [(2, 24), (2, 24)] 2"
    ]  # fmt: skip


def test_bases_that_lie_on_the_device_at_once_are_counted_in_weights_of_the_profiles() -> None:
    """A copy counts while it is held, an fp32 one of a 16-bit base twice, a shared base once, what lies on the CPU never."""
    code = """
    import copy, gc, tempfile
    from dataclasses import replace
    from pathlib import Path
    from peft import LoraConfig
    from lora_course import inject, lab, qlora
    from lora_course.lab.profiles import profiles
    from tools.pretended import chapters, held
    meter = held.Meter(chapters.redirect(Path(tempfile.mkdtemp())))
    half, seven = (profiles()[name] for name in ("t4", "large"))
    def count(what, profile):
        print(what, round(meter.bases(profile), 1), *meter.unlike(replace(profile, copies=2)))
    meter.step(8 * 256)
    def use(model):
        with torch.no_grad():
            model(torch.tensor([[5, 6]], device=model.device), use_cache=False)
    here, _ = lab.load_base(half, device="cpu")
    use(here)
    nano = qlora.load_4bit(lab.base_path("nano"))
    use(nano)
    count("on the CPU", half)
    model, _ = lab.load_base(half)
    config = LoraConfig(r=4, target_modules="all-linear")
    use(inject(model, config))
    count("one with an adapter", half)
    use(copy.deepcopy(model))
    count("and a copy", half)
    meter.step(8 * 128)
    count("a shorter step beside the longest", half)
    meter.step(8 * 256 + 1)
    count("a longer step", half)
    meter.tokens = 8 * 128
    count("all steps shorter", half)
    meter.tokens = 8 * 256
    gc.collect()
    wide = copy.deepcopy(model).float()
    use(wide)
    count("and one in fp32", half)
    del wide, model
    gc.collect()
    meter.seen = {(0, 0)}
    four = qlora.load_4bit(seven.model)
    use(inject(four, config))
    meter.tokens = 4 * 256
    count("four bits", seven)
    """
    lines = [line for line in on_a_gpu(code).splitlines() if line.startswith(("o", "a", "f"))]
    half, seven = "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B"
    assert lines == [
        f"on the CPU 0.0 announces 2 bases of {half} at once, and holds 0.0",
        f"one with an adapter 1.0 announces 2 bases of {half} at once, and holds 1.0",
        "and a copy 2.0",
        "a shorter step beside the longest 2.0",
        "a longer step 2.0 announces steps of 8 × 256 tokens, and trains on 2,049 at most",
        "all steps shorter 2.0 announces steps of 8 × 256 tokens, and trains on 1,024 at most",
        f"and one in fp32 3.0 announces 2 bases of {half} at once, and holds 3.0",
        f"four bits 1.0 announces 2 bases of {seven} at once, and holds 1.0",
    ]


def test_a_chapter_that_ends_its_process_is_told_from_one_that_fails_and_one_that_passes() -> None:
    code = """
    import os
    from tools.pretended import chapters
    for ends in (lambda *_: [], lambda *_: ["cell 3"], lambda *_: (print("out of memory", flush=True), os._exit(9))):
        chapters.run_here = ends
        print(chapters.run_apart("0_1_lora", 1, False, True))
    """
    process = run(textwrap.dedent(code))
    assert process.stdout.splitlines() == [
        "[]", "['cell 3']", "['0_1_lora: the process ended early: out of memory\\n']"
    ], process.stderr  # fmt: skip


CELLS = {
    "set-up": "import lab",
    "pick": "profile = lab.pick_profile()",
    "heavy": "base = lab.load_base('nano')\nscore = lab.evaluate(base)",
    "figure": "lab.show(score)",
    "helper": "def size_of(model):\n    return sum(p.numel() for p in model.parameters()) / unit",
    "unit": "unit = 1e6",
    "table": "table = {}",
    "fill": "table['first'] = 1",
    "loop": "for model in [base]:\n    print(model)",
    "live": "model = lab.load_base(profile)\ntable['live'] = size_of(model)",
    "after": "print(table, model)",
    "other": "model = lab.load_base('nano')",
    "clean": "print(model, claims)",
}


def chosen(cells: dict[str, str]) -> list[str]:
    return [list(cells)[i] for i in live(list(cells.values()))]


def test_live_cells_are_those_that_the_profile_changes_and_what_they_need() -> None:
    expected = ["set-up", "pick", "helper", "unit", "table", "fill", "live", "after"]
    assert chosen(CELLS) == expected
    needs_base = {"live": CELLS["live"].replace("profile)", "profile, base)")}
    assert chosen(CELLS | needs_base) == [*expected[:2], "heavy", *expected[2:]]
    within_an_if = {"live": CELLS["live"] + "\nif model:\n    score = 1\n    print(score)"}
    assert chosen(CELLS | within_an_if) == expected, "score is bound there before it is used"
    in_one_branch = {"live": CELLS["live"] + "\nif model:\n    score = 1\nelse:\n    print(score)"}
    assert chosen(CELLS | in_one_branch) == [*expected[:2], "heavy", "figure", *expected[2:]]
    changed_in_place = {"other": "inject(model, 4)", "clean": "print(model)"}
    assert chosen(CELLS | changed_in_place) == [*expected, "other", "clean"]
    assert chosen({"set-up": "import lab", "heavy": "lab.train()"}) == []


def test_what_a_live_cell_only_needs_is_told_from_what_the_profile_changes() -> None:
    names = list(CELLS)
    assert [names[i] for i in sorted(changed(read_all(list(CELLS.values()))))] == ["live", "after"]


@pytest.mark.parametrize("path", chapters(), ids=lambda path: path.stem)
def test_gpu_cells_take_steps_batch_and_length_from_the_profile(path: Path) -> None:
    cells = [c for c in jupytext.read(path).cells if "gpu" in c.metadata.get("tags", [])]
    assert len(cells) == (path.stem != "5_1_comparison")
    typed = re.compile(
        r"(?<!save_)(?:max_steps|total_step|steps|batch|batch_size)=\d|blocks\(.*, \d+\)"
    )
    assert not [line for cell in cells for line in cell.source.splitlines() if typed.search(line)]


@pytest.mark.lane
@pytest.mark.parametrize(
    ("stem", "how"),
    [
        ("4_2_hierarchical", ("--profile", "tiny")),
        ("4_3_quantized", ("--live", "--profile", "t4")),
        ("3_3_continual", ("--live", "--profile", "large", "--bf16")),
    ],
)
def test_a_chapter_runs_on_a_pretended_gpu(stem: str, how: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "tools.pretended.chapters", stem, *how]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
