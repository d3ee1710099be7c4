"""State around the variants' arithmetic, as users meet it: told, kept or refused before any work."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_course import lab
from lora_course.checkpoint import save_adapter
from lora_course.continual import Replay, Reservoir, Task, learn
from lora_course.distillation import Teachers
from lora_course.experts import ExpertsLinear
from lora_course.hierarchical import at_rank
from lora_course.injection import adapter_layers, inject, merge, unmerge
from lora_course.lab import profiles
from lora_course.lab.estimate import Shape
from lora_course.lab.tasks import load_task, write_answers
from lora_course.qlora import quantize_model
from lora_course.serving import load_adapters
from lora_course.sparse import SparseDeltaLinear
from lora_course.states import adapter_state
from tests.continual.models import arguments, injected, rows, tasks
from tests.distillation.models import adapted, student
from tests.models import batch, config, qwen
from tests.test_hierarchical import ROUNDED, nested

pytestmark = pytest.mark.usefixtures("one_thread")


def test_experts_refuse_stacks_whose_layers_see_other_tokens() -> None:
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=9)
    )
    bert = BertForMaskedLM(
        BertConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            vocab_size=9,
        )
    )
    for model, targets, said in (
        (t5, r"decoder\..*\.(q|v)", "decoder-only"),
        (bert, ["query"], "takes input_ids"),
    ):
        with pytest.raises(ValueError, match=said):
            inject(model, LoraConfig(r=1, target_modules=targets), layer=ExpertsLinear)
        assert not hasattr(model, "lora_course")


def test_what_was_merged_at_a_cut_is_whole_again_when_it_is_unmerged() -> None:
    model = nested()
    before = model(**batch()).logits
    with at_rank(model, 3), at_rank(model, 2):
        merge(model)
    found = nested(seed=2)
    found.load_state_dict(model.state_dict())
    for one in (model, found):
        unmerge(one)
        torch.testing.assert_close(one(**batch()).logits, before, **ROUNDED)
        assert {layer.rank for layer in adapter_layers(one).values()} == {5}
    with at_rank(model, 2):
        expected = model(**batch()).logits
        unmerge(merge(model))
        torch.testing.assert_close(model(**batch()).logits, expected, **ROUNDED)


def test_teachers_of_another_scale_are_other_teachers() -> None:
    model, state = student(), adapter_state(adapted(2))
    louder = {k: 2 * v if k.endswith("scaling") else v for k, v in state.items()}
    assert (
        Teachers(model, {"a": state}).fingerprint() == Teachers(model, {"a": state}).fingerprint()
    )
    assert (
        Teachers(model, {"a": state}).fingerprint() != Teachers(model, {"a": louder}).fingerprint()
    )


def test_a_described_model_has_its_bytes() -> None:
    described, (model, _) = lab.describe_base("nano"), lab.load_base("nano")
    assert (
        lab.tensor_bytes(described)
        == lab.tensor_bytes(model)
        > sum(p.nbytes for p in model.parameters())
    )


@pytest.mark.parametrize("package", ["transformers", "peft", "datasets", "matplotlib"])
def test_doctor_speaks_where_a_package_is_missing(package: str) -> None:
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == {package!r}: raise ModuleNotFoundError(f'No module named {{name!r}}')
sys.meta_path.insert(0, Missing())
from lora_course.machine import environment
here = environment.installed
environment.installed = lambda: {{name: v for name, v in here().items() if name != {package!r}}}
from lora_course.cli import main
sys.exit(main(['doctor']))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        run.returncode == 1 and "mend" in run.stdout and package in run.stdout.splitlines()[-1]
    ), run.stderr


def test_one_string_is_no_list_of_documents() -> None:
    model, tokenizer = lab.load_base("nano")
    for call in (
        lambda: lab.bits_per_byte(model, tokenizer, "In the beginning"),
        lambda: lab.blocks(tokenizer, "In the beginning", 2),
        lambda: lab.excerpt("In the beginning", 5),
    ):
        with pytest.raises(TypeError, match=r"\[text\]"):
            call()
    with pytest.raises(ValueError, match="context=-1"):
        lab.bits_per_byte(model, tokenizer, ["a"], context=-1)
    with pytest.raises(ValueError, match="length=0"):
        lab.blocks(tokenizer, ["a"], 0)


def test_a_chat_models_own_settings_change_nothing() -> None:
    model, tokenizer = lab.load_base("nano")
    prompt, words = "The cat and the cat and the cat and", load_task("past", "test")["question"][:4]
    expected = (
        lab.generate(model, tokenizer, prompt, 30, temperature=0),
        write_answers(model, tokenizer, "past", words),
    )
    model.generation_config.repetition_penalty = 1.5
    own = model.generation_config
    assert (
        lab.generate(model, tokenizer, prompt, 30, temperature=0),
        write_answers(model, tokenizer, "past", words),
    ) == expected
    assert model.generation_config is own


def test_files_left_in_the_cache_are_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        profiles, "CGROUPS", tuple((f"{tmp_path}{f}", *n) for f, *n in profiles.CGROUPS)
    )
    v2, v1 = Path(f"{tmp_path}/sys/fs/cgroup"), Path(f"{tmp_path}/sys/fs/cgroup/memory")
    v1.mkdir(parents=True)
    (v2 / "memory.max").write_text("1000000\n")
    (v2 / "memory.current").write_text("900000\n")
    (v2 / "memory.stat").write_text("anon 300000\ninactive_file 500000\n")
    assert profiles.free_memory("cpu") == 600_000
    (v2 / "memory.max").write_text("max\n")
    assert profiles.free_memory("cpu") > 10**7
    (v1 / "memory.limit_in_bytes").write_text("2000000\n")
    (v1 / "memory.usage_in_bytes").write_text("900000\n")
    (v1 / "memory.stat").write_text("cache 500000\ntotal_inactive_file 500000\n")
    assert profiles.free_memory("cpu") == 1_600_000


def test_a_shape_counts_queries_of_another_width_than_the_models() -> None:
    fields = Qwen3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=24,
        num_hidden_layers=2,
        vocab_size=50,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(fields)
    linears = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    shape = Shape.from_config(fields.to_dict())
    assert shape.linear == sum(m.weight.numel() for m in linears)
    assert shape.adapter(3) == sum(3 * (m.in_features + m.out_features) for m in linears)


def test_what_replay_cant_do_is_refused_before_the_first_task(tmp_path: Path) -> None:
    strategy = Replay(budget_bytes=20)
    with pytest.raises(ValueError, match="budget_bytes=20 holds no row: one takes about 80 bytes"):
        learn(injected(strategy), tasks(2), strategy, arguments(tmp_path / "a"))
    masked = rows(1).map(lambda row: {"attention_mask": [1] * 10})
    strategy = Replay(budget_bytes=2000)
    with pytest.raises(ValueError, match="attention_mask"):
        learn(
            injected(strategy),
            [tasks(1)[0], Task("b", masked, masked)],
            strategy,
            arguments(tmp_path / "a"),
        )
    short = datasets.Dataset.from_dict(
        {
            "input_ids": rows(1)[:]["input_ids"][:, :5].numpy(),
            "labels": rows(1)[:]["input_ids"][:, :5].numpy(),
        }
    ).with_format("torch")
    with pytest.raises(ValueError, match="5 to 10 tokens"):
        learn(
            injected(strategy),
            [tasks(1)[0], Task("b", short, short)],
            strategy,
            arguments(tmp_path / "a"),
        )
    assert not (tmp_path / "a").exists()


def test_rows_that_memory_held_before_belong_to_the_run(tmp_path: Path) -> None:
    def holding(task: int) -> Replay:
        strategy = Replay(budget_bytes=2000)
        strategy.memory.add(rows(task))
        return strategy

    first = holding(3)
    learn(injected(first), tasks(2), first, arguments(tmp_path))
    learn(injected(first), tasks(2), first, arguments(tmp_path))  # the same object, and a new one
    learn(injected(first), tasks(2), holding(3), arguments(tmp_path))
    for other in (holding(4), Replay(budget_bytes=2000)):
        with pytest.raises(ValueError, match="strategy.given"):
            learn(injected(other), tasks(2), other, arguments(tmp_path))


def test_a_row_larger_than_the_budget_shuts_out_no_other() -> None:
    small = [{"input_ids": torch.arange(10)}] * 20
    for seed in range(30):
        memory = Reservoir(400, seed)
        memory.add([*small[:10], {"input_ids": torch.arange(500)}, *small[10:]])
        assert len(memory.rows) == 10 and memory.seen == 21


def test_an_adapter_in_a_folder_of_another_base_is_warned_of(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    other = qwen()
    for p in other.parameters():
        p.data.mul_(1.5)
    for use in (
        lambda base: load_adapters(base, {"a": tmp_path / "a"}),
        lambda base: Teachers(inject(base, config()), {"a": tmp_path / "a"}),
    ):
        with pytest.warns(UserWarning, match="not those that the adapter in"):
            use(copy.deepcopy(other))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            use(qwen())


def test_quantize_model_names_what_skip_does_not_find() -> None:
    with pytest.raises(ValueError, match="'lmhead'"):
        quantize_model(qwen(), skip=("lmhead",))
    with pytest.raises(ValueError, match="skip"):
        quantize_model(qwen(), skip="down_proj")


def test_a_mask_by_magnitude_needs_the_weight() -> None:
    with pytest.raises(TypeError, match="described or offloaded"):
        SparseDeltaLinear(nn.Linear(8, 8, device="meta"), 1, 1, mask="magnitude")
