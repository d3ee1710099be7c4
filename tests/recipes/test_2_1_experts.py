"""The recipe of chapter 2.1."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from lora_course import experts, lab, load_adapter
from lora_course.export import export_peft
from lora_course.folders import read_factors
from lora_course.injection import adapter_layers, inject, unload
from lora_course.states import concatenate, relative_error
from tests.models import config, randomize
from tests.recipes import chats, recipe, small

KINDS = {"law": "bible", "code": "python", "support": "glosses"}


@pytest.mark.slow
def test_2_1_averages_three_folders_of_peft_and_routes_them_at_the_best_of_three_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = _folders()
    given = {"mixed": lab.excerpt(lab.load_text("bible", "train"), 20_000)} | {
        split: {kind: lab.excerpt(lab.load_text(d, split), 600) for kind, d in KINDS.items()}
        for split in ("validation", "test")
    }
    code = _recipe()
    exec(code, given)
    model, found, tried, parts = (given[name] for name in ("model", "found", "tried", "parts"))
    assert experts.expert_state(model, 2).keys() and len(adapter_layers(model)) == 28

    # the average is the mean of the updates, at one rank for servers, and PEFT reads it; fp32 rounds at 1e-7
    average = read_factors("adapters/average")
    assert relative_error(average, concatenate(parts, [1 / 3] * 3)) < 1e-5
    assert {tensor.shape[0] for key, tensor in average.items() if key.endswith(".A")} == {2 + 3 + 4}
    # rows are what their names say: an adapter scored in PEFT, and the router as it was saved
    adapted = PeftModel.from_pretrained(lab.load_base("nano")[0], "adapters/one")
    scored = lab.bits_per_byte(adapted, tokenizer, given["test"]["code"])
    assert found["one"]["code"] == pytest.approx(scored, abs=1e-4)
    best = min(tried, key=tried.get)
    routed = load_adapter(lab.load_base("nano")[0], f"adapters/router-{best}")
    scored = lab.bits_per_byte(routed, tokenizer, given["test"]["law"])
    assert found["router"]["law"] == pytest.approx(scored, abs=1e-4)
    assert set(found) == {*KINDS, "average", "one", "router"}
    # each rate started from the same router, and a larger rate took it further
    routers = {rate: _routers(Path(f"adapters/router-{rate}")) for rate in tried}
    apart = [(routers[rate] - routers[0.03]).norm() for rate in (0.08, 0.2)]
    assert len(set(tried.values())) == 3 and 0 < apart[0] < apart[1]

    kept = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.safetensors")}
    exec(code.replace("0.2)", "0.2, 0.5)"), given)  # one more rate, as the text says
    assert given["tried"] == tried | {0.5: given["tried"][0.5]}
    assert kept and all(path.stat().st_mtime_ns == before for path, before in kept.items())


@pytest.mark.slow
def test_2_1_takes_rows_of_chats_and_scores_their_answers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _folders()
    code = _recipe()
    code, blocks = re.subn(r"rows = lab.*# for chats: ", "", code)
    code, lines = re.subn(r"# (score = |return )", r"\1", code)
    assert (blocks, lines) == (1, 2)

    def rows(split: str, domain: str) -> list[dict[str, list[int]]]:
        return chats(lab.load_text(domain, split)[:9], 3)

    given: dict = {"mixed": [row for d in KINDS.values() for row in rows("train", d)]} | {
        split: {kind: rows(split, d) for kind, d in KINDS.items()}
        for split in ("validation", "test")
    }
    exec(code, given)
    found, tried = given["found"], given["tried"]
    # nats an answer token: of an adapter in PEFT, and of the router as it was saved
    adapted = PeftModel.from_pretrained(lab.load_base("nano")[0], "adapters/one").eval()
    assert found["one"]["code"] == pytest.approx(_loss(adapted, given["test"]["code"]), abs=1e-3)
    best = f"adapters/router-{min(tried, key=tried.get)}"
    routed = load_adapter(lab.load_base("nano")[0], best).eval()
    assert found["router"]["law"] == pytest.approx(_loss(routed, given["test"]["law"]), abs=1e-3)
    assert set(found) == {*KINDS, "average", "one", "router"} and len(set(tried.values())) == 3


@torch.no_grad()
def _loss(model: torch.nn.Module, rows: list[dict[str, list[int]]]) -> float:
    return model(
        **{name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    ).loss.item()


def _recipe() -> str:
    return small(recipe("2_1_experts"), steps=2).replace(str(lab.base_path("nano")), "nano")


def _folders() -> PreTrainedTokenizerBase:
    """The base and four adapters, where the recipe looks for them; returns the base's tokenizer."""
    base, tokenizer = lab.load_base("nano")
    base.save_pretrained("nano")  # in fp32, so that scores compare; its own file is in 16 bits
    tokenizer.save_pretrained("nano")
    for seed, name in enumerate((*KINDS, "one")):
        export_peft(randomize(inject(base, config(r=2 + seed)), seed), f"adapters/{name}")
        unload(base)
    return tokenizer


def _routers(folder: Path) -> torch.Tensor:
    state = load_file(folder / "adapter.safetensors")
    found = [tensor.flatten() for name, tensor in state.items() if name.endswith(".router")]
    assert len(found) == 4  # one a block
    return torch.cat(found)
