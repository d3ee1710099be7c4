"""`lora_course.injection`: adapters go in, are switched off, merged and taken out, and the base stays what it was."""

import copy
import math
import weakref
from pathlib import Path

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from lora_course.checkpoint import load_adapter, save_adapter
from lora_course.hierarchical import NestedLoRALinear
from lora_course.injection import (
    adapter_layers,
    disabled,
    inject,
    injection_of,
    merge,
    unload,
    unmerge,
)
from lora_course.lora import LoRALinear
from lora_course.states import adapter_state
from tests.models import SHAPE, batch, config, pair, qwen, randomize


def test_disabled_and_unload_give_the_base_back() -> None:
    base = qwen()
    for parameter in base.model.embed_tokens.parameters():
        parameter.requires_grad_(False)
    names, flags = (
        [n for n, _ in base.named_parameters()],
        [p.requires_grad for p in base.parameters()],
    )
    reference = base(**batch()).logits
    model = randomize(inject(base, config()))
    adapted = model(**batch()).logits
    assert (adapted - reference).abs().max() > 0.01
    with disabled(model):
        torch.testing.assert_close(model(**batch()).logits, reference, atol=0, rtol=0)
    torch.testing.assert_close(model(**batch()).logits, adapted, atol=0, rtol=0)
    unload(model)
    assert [n for n, _ in model.named_parameters()] == names
    assert [p.requires_grad for p in model.parameters()] == flags
    torch.testing.assert_close(model(**batch()).logits, reference, atol=0, rtol=0)
    unload(merge(randomize(inject(model, config()))))
    torch.testing.assert_close(model(**batch()).logits, adapted, atol=1e-5, rtol=1e-5)


def test_other_architectures_work_as_they_are() -> None:
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=False)).eval()
    ours, theirs = pair(base)
    torch.testing.assert_close(
        ours(**batch()).logits, theirs(**batch()).logits, atol=1e-5, rtol=1e-5
    )
    assert "lm_head" not in adapter_layers(ours)
    copied = copy.deepcopy(ours)
    torch.testing.assert_close(ours(**batch()).logits, copied(**batch()).logits, atol=0, rtol=0)


def test_a_variant_can_weigh_components_and_connect_its_layers() -> None:
    calls = []

    class Half(LoRALinear):
        def transform_hidden(self, h: torch.Tensor) -> torch.Tensor:
            return h / 2

        @classmethod
        def after_inject(cls, model: nn.Module, layers: dict[str, LoRALinear]) -> None:
            assert layers == adapter_layers(model)
            calls.append("in")
            if len(layers) < 4:
                raise ValueError("too few")

        @classmethod
        def before_unload(cls, model: nn.Module, layers: dict[str, LoRALinear]) -> None:
            assert layers == adapter_layers(model)
            calls.append("out")

    halved, whole = randomize(inject(qwen(), config(), Half)), randomize(inject(qwen(), config()))
    for layer in adapter_layers(whole).values():
        layer.scaling /= 2
    torch.testing.assert_close(
        halved(**batch()).logits, whole(**batch()).logits, atol=1e-5, rtol=1e-5
    )
    unload(halved)
    model = qwen()
    with pytest.raises(ValueError, match="too few"):
        inject(model, config(target_modules=["q_proj"]), Half)
    assert calls == ["in", "out", "in", "out"]
    assert not any(isinstance(m, LoRALinear) for m in model.modules()) and all(
        p.requires_grad for p in model.parameters()
    )


def test_a_variant_names_its_own_rank_and_factors() -> None:
    class Halved(LoRALinear):
        """Rank from another field than r; computes with factors of its own."""

        @classmethod
        def initial_rank(cls, config: LoraConfig) -> int:
            if config.r == 7:
                raise ValueError("seven is refused")
            return config.r * 2

        def factors(self) -> tuple[torch.Tensor, torch.Tensor, float]:
            return self.A, self.B / 2, self.scaling

    base = qwen()
    with pytest.raises(ValueError, match="seven"):
        inject(base, config(r=7), layer=Halved)
    assert not hasattr(base, "lora_course") and all(p.requires_grad for p in base.parameters())
    model = randomize(inject(base, config(rank_pattern={"q_proj": 5}), layer=Halved))
    assert {layer.r for layer in adapter_layers(model).values()} == {5, 6}
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 48)
    torch.testing.assert_close(
        layer(x), layer.base_layer(x) + x @ layer.delta_weight().T, atol=1e-5, rtol=1e-5
    )


def test_rank_below_one_second_injection_and_foreign_adapters_are_refused() -> None:
    with pytest.raises(ValueError, match="r=0"):
        LoRALinear(nn.Linear(2, 2), r=0, lora_alpha=1)
    model = inject(qwen(), config())
    with pytest.raises(ValueError, match="carries an adapter already"):
        inject(model, config())
    with pytest.raises(ValueError, match="PEFT adapter already"):
        inject(get_peft_model(qwen(), config()), config())
    with pytest.raises(ValueError, match="inject"):
        adapter_state(qwen())
    with pytest.raises(TypeError, match="peft.LoraConfig"):
        inject(qwen(), {"r": 8})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_merged_equals_unmerged_and_unmerge_restores(dtype: torch.dtype, tolerance: float) -> None:
    model = randomize(inject(qwen().to(dtype), config()))
    before = {n: layer.base_layer.weight.clone() for n, layer in adapter_layers(model).items()}
    unmerged = model(**batch()).logits
    merge(model)
    torch.testing.assert_close(model(**batch()).logits, unmerged, atol=tolerance, rtol=tolerance)
    with pytest.raises(RuntimeError, match="merged already"):
        merge(model)
    with pytest.raises(RuntimeError, match="merged"), disabled(model):
        pass
    unmerge(model)
    for name, layer in adapter_layers(model).items():
        torch.testing.assert_close(
            layer.base_layer.weight, before[name], atol=tolerance / 10, rtol=tolerance / 10
        )
    with pytest.raises(RuntimeError, match="merged"):
        unmerge(model)


class Tied(nn.Module):
    """Two linear layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(torch.tanh(self.one(x)))


@pytest.mark.parametrize("targets", [["one"], ["other"], ["one", "other"]])
def test_a_weight_that_two_modules_share_is_adapted_and_not_merged(targets: list[str]) -> None:
    model = randomize(inject(Tied(), LoraConfig(r=2, lora_alpha=6, target_modules=targets)))
    x = torch.randn(3, 8)
    before = model(x)
    with pytest.raises(RuntimeError, match="shares its weight with"):
        merge(model)
    torch.testing.assert_close(model(x), before, atol=0, rtol=0)


def test_numbers_of_numpy_are_taken_and_can_be_saved(tmp_path: Path) -> None:
    given = config(
        r=numpy.int64(3), lora_alpha=numpy.float32(6), rank_pattern={"q_proj": numpy.int32(2)}
    )
    model = inject(qwen(), given)
    assert {layer.r for layer in adapter_layers(model).values()} == {2, 3}
    load_adapter(qwen(), save_adapter(model, tmp_path))
    assert type(injection_of(model).config.lora_alpha) is float


@pytest.mark.parametrize("ranks", [range(1, 4), [numpy.int64(1), numpy.int64(3)]])
def test_arguments_that_json_can_not_hold_are_made_plain(
    tmp_path: Path, ranks: list[int] | range
) -> None:
    model = inject(qwen(), config(), NestedLoRALinear, ranks=ranks)
    assert injection_of(model).arguments == {"ranks": list(ranks)}
    load_adapter(qwen(), save_adapter(model, tmp_path))


@pytest.mark.parametrize(
    "fields", [{"r": True}, {"lora_alpha": math.inf}, {"lora_alpha": math.nan}]
)
def test_what_is_no_rank_and_no_scale_is_refused(fields: dict) -> None:
    model = qwen()
    with pytest.raises(ValueError, match=next(iter(fields))):
        inject(model, config(**fields))
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_a_task_whose_head_starts_at_random_is_refused() -> None:
    with pytest.raises(ValueError, match="SEQ_CLS.*head"):
        inject(qwen(), config(task_type="SEQ_CLS"))
    with pytest.warns(UserWarning, match="Qwen2ForSequenceClassification has a head.*random weights"):  # fmt: skip
        inject(Qwen2ForSequenceClassification(Qwen2Config(**SHAPE)), config(target_modules=["q_proj"], task_type=None))  # fmt: skip


def test_a_compiled_model_is_saved_under_the_names_of_the_plain_one(tmp_path: Path) -> None:
    model = randomize(inject(qwen(), config()))
    expected = adapter_state(model)
    compiled = torch.compile(model, backend="eager")
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")
    assert adapter_state(compiled).keys() == expected.keys()
    again = load_adapter(qwen(), save_adapter(compiled, tmp_path))
    torch.testing.assert_close(again(**batch()).logits, model(**batch()).logits)
    plain = unload(compiled)
    assert not any(isinstance(module, LoRALinear) for module in plain.modules())


def test_a_compiled_model_takes_an_adapter_and_gives_its_base_back() -> None:
    base = qwen()
    names = [name for name, _ in base.named_parameters()]
    compiled = torch.compile(base, backend="eager")
    assert inject(compiled, config()) is compiled
    assert adapter_layers(compiled).keys() == adapter_layers(inject(qwen(), config())).keys()
    with pytest.raises(ValueError, match="carries an adapter already"):
        inject(compiled, config())
    assert unload(compiled) is base
    assert [name for name, _ in base.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_a_compiled_model_of_another_base_is_refused_and_as_it_was(tmp_path: Path) -> None:
    folder = save_adapter(inject(qwen(), config()), tmp_path)
    other = Qwen2ForCausalLM(Qwen2Config(**SHAPE | {"intermediate_size": 96}))
    with pytest.raises(ValueError, match="is for another base"):
        load_adapter(torch.compile(other, backend="eager"), folder)
    assert not any(isinstance(module, LoRALinear) for module in other.modules())


def test_a_model_that_is_wrapped_for_several_processes_is_refused() -> None:
    class Wrapped(DistributedDataParallel):
        """Without a process group."""

        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    wrapped = Wrapped(qwen())
    for model in (wrapped, torch.compile(wrapped, backend="eager")):
        with pytest.raises(ValueError, match="inject into model.module before wrapping"):
            inject(model, config())
    assert not any(isinstance(module, LoRALinear) for module in wrapped.modules())


def test_save_pretrained_writes_the_adapter_and_says_so(tmp_path: Path) -> None:
    model = randomize(inject(qwen(), config()))
    copied = randomize(copy.deepcopy(model), seed=8)
    for saved, name in ((model, "a"), (copied, "b")):
        with pytest.warns(UserWarning, match="adapter alone.*load_adapter"):
            saved.save_pretrained(tmp_path / name)
        again = load_adapter(qwen(), tmp_path / name)
        torch.testing.assert_close(again(**batch()).logits, saved(**batch()).logits)
    with pytest.raises(ValueError, match="export_peft"):
        model.save_pretrained(tmp_path / "c", push_to_hub=True)
    merge(model)
    with pytest.raises(RuntimeError, match="unload"):
        model.save_pretrained(tmp_path / "c")
    assert not (tmp_path / "c").exists()
    plain = unload(model)
    plain.save_pretrained(tmp_path / "whole")
    reloaded = Qwen2ForCausalLM.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(reloaded(**batch()).logits, plain(**batch()).logits)


def test_a_plain_trainers_checkpoint_is_an_adapter_that_loads(tmp_path: Path) -> None:
    model = randomize(inject(qwen(), config()))
    data = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 2
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    with pytest.warns(UserWarning, match="AdapterTrainer"):
        Trainer(model, arguments, train_dataset=data).train()
    again = load_adapter(qwen(), tmp_path / "checkpoint-1").eval()
    torch.testing.assert_close(again(**batch()).logits, model.eval()(**batch()).logits)


def test_a_deleted_model_is_freed_at_once() -> None:
    model = inject(qwen(), config())
    alive = weakref.ref(model)
    del model
    assert alive() is None
