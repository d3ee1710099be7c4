"""The recipe of chapter 2.1."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lora_course import experts, lab, load_adapter
from lora_course.export import export_peft
from lora_course.folders import read_factors
from lora_course.injection import adapter_layers, inject, unload
from lora_course.states import concatenate, relative_error
from tests.models import config, randomize
from tests.recipes import recipe, small

KINDS = {"law": "bible", "code": "python", "support": "glosses"}


@pytest.mark.slow
def test_2_1_averages_three_folders_of_peft_and_routes_them_at_the_best_of_three_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base, tokenizer = lab.load_base("nano")
    base.save_pretrained("nano")  # in fp32, so that scores compare; its own file is in 16 bits
    tokenizer.save_pretrained("nano")
    for seed, name in enumerate((*KINDS, "one")):
        export_peft(randomize(inject(base, config(r=2 + seed)), seed), f"adapters/{name}")
        unload(base)
    given = {"mixed": lab.excerpt(lab.load_text("bible", "train"), 20_000)} | {
        split: {kind: lab.excerpt(lab.load_text(d, split), 600) for kind, d in KINDS.items()}
        for split in ("validation", "test")
    }
    code = small(recipe("2_1_experts"), steps=2).replace(str(lab.base_path("nano")), "nano")
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


def _routers(folder: Path) -> torch.Tensor:
    state = load_file(folder / "adapter.safetensors")
    found = [tensor.flatten() for name, tensor in state.items() if name.endswith(".router")]
    assert len(found) == 4  # one a block
    return torch.cat(found)
