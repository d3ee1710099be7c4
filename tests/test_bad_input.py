"""Bad input: one sentence of this package's own, before any work; a model that was refused is as it was."""

from __future__ import annotations

import json
import linecache
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_course import cli, merging
from lora_course.adaptive import GrowthSchedule
from lora_course.checkpoint import load_adapter, save_adapter
from lora_course.distillation import DistillationConfig, Teachers, distillation_loss
from lora_course.experts import ExpertsLinear, fixed_gates
from lora_course.export import export_peft, load_peft
from lora_course.hierarchical import NestedLoRALinear, at_rank
from lora_course.injection import inject, unload
from lora_course.progressive import Stage
from lora_course.quantized import QuantizedLoRALinear, load_quantized, save_quantized
from lora_course.quantized.files import FILE
from lora_course.quantized.grid import fake_quantize, quantize
from lora_course.states import adapter_state, concatenate, factor_state, truncate, use_adapter
from tests.models import config, qwen, randomize

CASES = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
SENTENCE = (ValueError, TypeError, RuntimeError, FileNotFoundError)
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.floats(width=32), st.sampled_from(["", "all", "q_proj", "("]),
    st.lists(st.integers(-1, 3), max_size=2),
)  # fmt: skip
TARGETS = ["q_proj", "down_proj"]


def is_our_own(error: BaseException) -> bool:
    """Whether an error was raised by a `raise` in this package, and so says what to do."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    return "/lora_course/" in last.filename and line.startswith("raise")


def accepted(call: Callable[[], Any]) -> bool:
    """Whether `call` is taken; where it is not, by a sentence of ours."""
    try:
        call()
    except SENTENCE as error:
        if not is_our_own(error):
            raise
        assert len(str(error)) > 20, error
        return False
    return True


BASE = qwen()


def fingerprint(model: nn.Module) -> dict[str, Any]:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    return {"weights": weights, "trainable": trainable, "kinds": [type(m) for m in model.modules()]}


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["trainable"] == after["trainable"] and before["kinds"] == after["kinds"]
    assert before["weights"].keys() == after["weights"].keys()
    for name, tensor in before["weights"].items():
        assert torch.equal(tensor, after["weights"][name]), name


BEFORE = fingerprint(BASE)
FIELDS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "init_lora_weights",
    "use_rslora",
)


@CASES
@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING, min_size=1, max_size=2))
def test_inject(fields: dict[str, Any]) -> None:
    try:
        asked = LoraConfig(**{"r": 2, "target_modules": TARGETS} | fields)
    except Exception:  # PEFT's own refusal
        return
    if accepted(lambda: inject(BASE, asked)):
        unload(BASE)
    assert_same(BEFORE, fingerprint(BASE))


ADAPTED = randomize(inject(qwen(), config(target_modules=TARGETS)))
STATE = factor_state(ADAPTED)


def damaged(key: str, how: str) -> Any:
    """A state of which one tensor is something else."""
    tensor = STATE[key]
    changes: dict[str, Any] = {
        "nan": tensor * float("nan"), "infinite": tensor + float("inf"), "shorter": tensor.reshape(-1)[:1], "one more": tensor[None],
        "whole numbers": tensor.long(), "a list": tensor.tolist(), "none": None, "empty": tensor.reshape(-1)[:0],
    }  # fmt: skip
    if how == "missing":
        return {name: value for name, value in STATE.items() if name != key}
    if how == "another":
        return STATE | {f"{key}.more": tensor}
    return STATE | {key: changes[how]}


DAMAGES = st.builds(
    damaged,
    st.sampled_from(sorted(STATE)[:6]),
    st.sampled_from(
        ["nan", "infinite", "shorter", "one more", "whole numbers", "a list", "none", "empty", "missing", "another"]
    ),
)  # fmt: skip


@CASES
@given(st.one_of(DAMAGES, ANYTHING, st.just(STATE)))
def test_use_adapter(state: Any) -> None:
    before = adapter_state(ADAPTED)
    if not accepted(lambda: use_adapter(ADAPTED, state)):
        after = adapter_state(ADAPTED)
        assert all(torch.equal(before[name], after[name]) for name in before)
    use_adapter(ADAPTED, STATE)


@CASES
@given(st.one_of(st.just(STATE), DAMAGES), ANYTHING)
def test_truncate(state: Any, r: Any) -> None:
    accepted(lambda: truncate(state, r))


@CASES
@given(
    st.lists(st.one_of(st.just(STATE), DAMAGES), max_size=3),
    st.one_of(st.none(), st.lists(ANYTHING, max_size=3)),
)
def test_concatenate(states: list[Any], weights: Any) -> None:
    accepted(lambda: concatenate(states, weights))


@CASES
@given(
    st.sampled_from(["ties", "dare", "average_factors"]),
    st.lists(st.one_of(st.just(STATE), DAMAGES), max_size=2),
    ANYTHING,
    ANYTHING,
    st.one_of(st.none(), st.lists(ANYTHING, max_size=2)),
)
def test_merging(kind: str, states: list[Any], r: Any, density: Any, weights: Any) -> None:
    function = getattr(merging, kind)
    if kind == "average_factors":
        accepted(lambda: function(states, weights))
    else:
        accepted(lambda: function(states, r, density=density, weights=weights))


@CASES
@given(
    st.sampled_from([quantize, fake_quantize]), st.sampled_from(["fine", "nan", "inf", "vector", "empty", "whole numbers"]),
    ANYTHING, st.one_of(st.sampled_from(["tensor", "channel", "group"]), ANYTHING), ANYTHING, ANYTHING,
)  # fmt: skip
def test_quantize(
    function: Callable[..., Any], kind: str, bits: Any, granularity: Any, group_size: Any, clip: Any
) -> None:
    x = torch.randn(3, 8)
    x = {
        "fine": x, "nan": x * float("nan"), "inf": x + float("inf"), "vector": x[0], "empty": x[:0], "whole numbers": x.long(),
    }[kind]  # fmt: skip
    accepted(lambda: function(x, bits, granularity, group_size, clip))


SHAPES = st.lists(st.integers(0, 3), min_size=1, max_size=3)


@CASES
@given(
    SHAPES, SHAPES, st.sampled_from([0.0, float("inf"), -float("inf"), float("nan")]), ANYTHING,
    st.sampled_from(["forward", "reverse"]), st.sampled_from(["probabilities", "logits"]),
)  # fmt: skip
def test_distillation_loss(
    shape: list[int], other: list[int], first: float, weights: Any, divergence: str, mixture: str
) -> None:
    student, teacher = torch.randn(shape), torch.randn(other)
    if teacher.numel():
        teacher.view(-1)[0] = first
    labels = torch.zeros(shape[:2], dtype=torch.long)
    asked = DistillationConfig(divergence=divergence, mixture=mixture)
    found: list[Tensor] = []
    if accepted(lambda: found.append(distillation_loss(student, [teacher], labels, asked, weights).loss)):  # fmt: skip
        assert torch.isfinite(found[0])


MIXTURE = inject(qwen(), config(target_modules=TARGETS), ExpertsLinear, num_experts=3)
NESTED = inject(qwen(), config(target_modules=TARGETS, r=4), NestedLoRALinear, ranks=[1, 4])


@CASES
@given(
    st.one_of(
        ANYTHING,
        st.lists(ANYTHING, max_size=4),
        st.lists(st.floats(width=32), min_size=3, max_size=3),
    )
)
def test_fixed_gates(gates: Any) -> None:
    def call() -> None:
        with fixed_gates(MIXTURE, gates):
            pass

    accepted(call)


@CASES
@given(ANYTHING, st.one_of(ANYTHING, st.lists(ANYTHING, max_size=3)))
def test_nested_ranks(b: Any, ranks: Any) -> None:
    def call() -> None:
        with at_rank(NESTED, b):
            pass

    accepted(call)
    plain = qwen()
    if accepted(lambda: inject(plain, config(target_modules=TARGETS, r=4), NestedLoRALinear, ranks=ranks)):  # fmt: skip
        unload(plain)
    assert_same(BEFORE, fingerprint(plain))


@CASES
@given(ANYTHING, ANYTHING, ANYTHING, ANYTHING, ANYTHING)
def test_schedules(first: Any, second: Any, third: Any, fourth: Any, fifth: Any) -> None:
    accepted(lambda: GrowthSchedule(first, second, third, 1, max_r=fourth, beta=fifth))
    accepted(lambda: GrowthSchedule(20, 2, 2, 1, beta=fifth))
    accepted(lambda: Stage(first, second, third, fourth, fifth))
    accepted(lambda: Stage(2, second, third))
    accepted(lambda: DistillationConfig(first, second, third, fourth))


STUDENT = inject(qwen(), config(target_modules=["q_proj"]))
TEACHERS_BEFORE = fingerprint(STUDENT)
EMBEDDING = "model.embed_tokens"
FOREIGN = {f"{EMBEDDING}.A": torch.ones(2, 48), f"{EMBEDDING}.B": torch.ones(97, 2), f"{EMBEDDING}.scaling": torch.ones(())}  # fmt: skip
DOMAINS = {"none": None, "short": [0], "float": [0.5, 0.5], "negative": [-1, 0], "fine": [0, 0]}


@CASES
@given(
    st.one_of(
        ANYTHING,
        st.dictionaries(
            st.one_of(st.sampled_from(["a", "b"]), st.integers(0, 1)),
            st.one_of(DAMAGES, ANYTHING, st.just(STATE), st.just(FOREIGN), st.just("/nowhere")),
            max_size=2,
        ),
    ),
    st.one_of(st.none(), ANYTHING, st.lists(st.one_of(ANYTHING, st.floats(width=32)), max_size=3)),
)  # fmt: skip
def test_teachers(states: Any, weights: Any) -> None:
    accepted(lambda: Teachers(STUDENT, states, weights))
    assert_same(TEACHERS_BEFORE, fingerprint(STUDENT))


@CASES
@given(
    st.one_of(st.none(), st.lists(st.floats(0, 2, width=32), min_size=1, max_size=3)),
    st.booleans(), st.sampled_from(sorted(DOMAINS)), st.sampled_from(["labels", "short", "none", "rows"]),
)  # fmt: skip
def test_what_teachers_are_asked(weights: Any, by_domain: bool, domain: str, labels: str) -> None:
    made: list[Teachers] = []
    given = weights if weights is None or not by_domain else [weights]
    if not accepted(lambda: made.append(Teachers(STUDENT, {"a": STATE}, given))):
        return
    ids = torch.arange(6).reshape(2, 3)
    counted = {"labels": ids, "short": ids[:, :1], "rows": ids[:1]}
    inputs = {"input_ids": ids} | ({"labels": counted[labels]} if labels in counted else {})
    if DOMAINS[domain] is not None:
        inputs["domain"] = torch.tensor(DOMAINS[domain])
    found: list[Tensor] = []
    if accepted(lambda: found.append(made[0].log_probs(inputs, DistillationConfig()))):
        assert torch.isfinite(found[0]).all()
    assert_same(TEACHERS_BEFORE, fingerprint(STUDENT))


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-2, 5), st.sampled_from(["", "LoRALinear", "x"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["a", "r"]), inner, max_size=2)
    ),
    max_leaves=4,
)  # fmt: skip
FOLDERS = Path(tempfile.mkdtemp())
save_adapter(ADAPTED, FOLDERS / "ours")
export_peft(ADAPTED, FOLDERS / "peft")
FILES = {
    "ours": ["adapter.json", "adapter.safetensors"],
    "peft": ["adapter_config.json", "adapter_model.safetensors"],
}


def teardown_module() -> None:
    shutil.rmtree(FOLDERS, ignore_errors=True)


@CASES
@given(st.sampled_from(["ours", "peft"]), st.data())
def test_damaged_folders(kind: str, data: st.DataObject) -> None:
    folder = FOLDERS / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(FOLDERS / kind, folder)
    path = folder / data.draw(st.sampled_from(FILES[kind]))
    content = path.read_bytes()
    how = data.draw(st.sampled_from(["cut", "missing", "field", "whole", "bytes"]))
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    elif how == "bytes" or path.suffix != ".json":
        path.write_bytes(data.draw(st.binary(max_size=40)))
    elif how == "whole":
        path.write_text(json.dumps(data.draw(JSON)))
    else:
        found = json.loads(content)
        found[data.draw(st.sampled_from(sorted(found)))] = data.draw(JSON)
        path.write_text(json.dumps(found))
    load = load_adapter if kind == "ours" else load_peft
    if accepted(lambda: load(BASE, folder)):
        unload(BASE)
    assert_same(BEFORE, fingerprint(BASE))


QUANTIZED = randomize(
    inject(qwen(), config(target_modules=TARGETS), QuantizedLoRALinear, bits=4, group_size=8)
)
save_quantized(QUANTIZED, FOLDERS / "quantized")
with safe_open(FOLDERS / "quantized" / FILE, "pt") as stored:
    WRITTEN = json.loads(stored.metadata()["lora_course"])
    CODES = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
PLACES = ["whole", "field", "grid", "layer", "name"]


@CASES
@given(st.sampled_from(["cut", "bytes", "missing", "no metadata", *PLACES * 2]), st.data())
def test_load_quantized(how: str, data: st.DataObject) -> None:
    folder = FOLDERS / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(FOLDERS / "quantized", folder)
    path, described = folder / FILE, json.loads(json.dumps(WRITTEN))
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    elif how == "bytes":
        path.write_bytes(data.draw(st.binary(max_size=40)))
    elif how == "no metadata":
        save_file(CODES, path)
    else:
        layers = described["layers"]
        first = next(iter(layers))
        new = data.draw(st.one_of(JSON, st.integers(-3, 40), st.floats(width=32)))
        if how == "whole":
            described = new
        elif how == "name":
            other = data.draw(st.sampled_from(["model.norm", "lm_head", "(", "q_proj", ""]))
            layers[other] = layers.pop(first)
        else:
            place = {"field": described, "grid": described["grid"], "layer": layers[first]}[how]
            place[data.draw(st.sampled_from(sorted(place)))] = new
        save_file(CODES, path, {"lora_course": json.dumps(described)})
    if accepted(lambda: load_quantized(BASE, folder)):
        assert torch.isfinite(BASE(torch.tensor([[1, 2]])).logits).all()
        unload(BASE)
    assert_same(BEFORE, fingerprint(BASE))


@pytest.mark.parametrize(
    ("content", "said"), [("{}", "no description of an adapter"), ("{", "is no JSON"), ("[]", "no description")]
)  # fmt: skip
def test_the_command_says_what_is_wrong_with_a_folder_in_one_line(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(FOLDERS / "ours", tmp_path / "source")
    (tmp_path / "source/adapter.json").write_text(content)
    assert cli.main(["convert", str(tmp_path / "source"), str(tmp_path / "target")]) == 2
    found = capsys.readouterr()
    assert said in found.err and found.err.count("\n") == 1 and found.out == ""
    assert not (tmp_path / "target").exists()
