"""What the page that plays is made from: adapters, record, tables and packing."""

import base64
import json
import re
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_course.states import relative_error, truncate
from tools.chapters import ROOT
from tools.playpage import adapters, pack
from tools.playpage.record import CUT, DOMAINS, RECORD, SETTINGS, Record, base_sha256
from tools.playpage.score import curve, score_domain
from tools.playpage.tables import tables


def test_the_adapters_were_trained_on_the_chapters_own_base() -> None:
    assert json.loads(RECORD.read_text())["base_sha256"] == base_sha256()


def test_a_slice_of_a_written_adapter_is_its_best_cut() -> None:
    """To the rounding to bf16, of which each number keeps 8 bits."""
    trained = adapters.read_adapter(f"{CUT}-as-trained")
    for r in (1, 4, 16):
        assert relative_error(adapters.read_adapter(CUT, r), truncate(trained, r)) < 1e-2
    assert relative_error(adapters.read_adapter(f"{CUT}-as-trained", 4), truncate(trained, 4)) > 0.1


@pytest.mark.slow
def test_the_record_reproduces() -> None:
    runs = json.loads(RECORD.read_text())["runs"]
    found = curve(adapters.read_adapter(CUT, 4), CUT)
    assert found == pytest.approx(runs[f"rank/{CUT}/4"], abs=2e-3)  # another order of sums
    found = score_domain(adapters.routed(), "milton")
    assert found == pytest.approx(runs["scores/routed"]["milton"], abs=2e-3)


def test_what_is_recorded_says_what_the_page_says_of_rank_bits_and_merges() -> None:
    """The sentences of the steps, each as an order of numbers."""
    runs = json.loads(RECORD.read_text())["runs"]
    alone = runs["scores/base"]
    assert all(runs[f"scores/{name}"][name] < alone[name] - 0.3 for name in DOMAINS)
    assert runs["scale/1"] < min(runs["scale/0.5"], runs["scale/2"])
    ranks = [runs[f"rank/{CUT}/{r}"] for r in SETTINGS["cuts"]]
    assert ranks == sorted(ranks, reverse=True)
    nested, trained = runs["rank/nested/1"], runs[f"rank/{CUT}-as-trained/1"]
    assert max(nested, ranks[0]) < trained - 0.2
    assert runs["bits/adapter/group/2"] < runs["bits/adapter/tensor/2"]
    assert runs["bits/adapter/group/2"] < runs["bits/base/group/2"]
    for domain in SETTINGS["merged"]:
        assert runs[f"merge/updates/{domain}"] < runs[f"merge/factors/{domain}"]


def test_a_record_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"settings": SETTINGS | {"r": 4}, "runs": {}}))
    with pytest.raises(ValueError, match="other settings"):
        Record(path)


def test_a_result_is_computed_once_and_kept(tmp_path: Path) -> None:
    record = Record(tmp_path / "record.json")
    assert record.run("key", lambda: 1) == 1
    assert Record(tmp_path / "record.json").run("key", lambda: 2) == 1


def test_the_code_is_as_small_as_the_page_says() -> None:
    code = sum(path.stat().st_size for path in (ROOT / "book/_static/play").glob("*.js"))
    assert code < 70_000 and "less than 70 kB" in (ROOT / "book/play.md").read_text()


def test_packed_tensors_come_back_bit_for_bit() -> None:
    content = {"a": ([3, 5], torch.randn(3, 5).bfloat16().view(torch.uint8).numpy().tobytes())}
    entry, scripts = pack.bundle("x", content)
    (script,) = scripts.values()
    text = re.fullmatch(r'receivePlayData\("x", 0, "(.*)"\);\n', script.decode())[1]
    planes = zlib.decompress(base64.b85decode(text))
    assert entry["tensors"] == [["a", [3, 5]]]
    assert b"".join(bytes(pair) for pair in zip(planes[15:], planes[:15])) == content["a"][1]


def test_another_type_than_bf16_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a.safetensors holds F32; bf16 is expected"):
        pack.tensors(tmp_path / "a.safetensors")


def test_the_tables_hold_what_was_recorded() -> None:
    text, runs = tables(ROOT, []), json.loads(RECORD.read_text())["runs"]
    assert f"{runs['scores/milton']['milton']:.2f}" in text
    assert f"{runs['rank/nested/2']:.3f}" in text and 'role="img"' in text
