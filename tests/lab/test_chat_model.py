"""`lora_course.lab.chat_model`: what chapters claim of a chat model is compared with what they found on nano."""

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest

from lora_course.experiments import smol_past, smol_several
from lora_course.experiments.smol_past import METHODS
from lora_course.lab import Claims, chat_model, chat_rules
from lora_course.lab.baselines import rule_of_three, suffix_table
from lora_course.lab.chat_model import (
    QUESTIONS,
    answer,
    missing,
    series,
)
from lora_course.lab.chat_words import BOTH
from lora_course.lab.study import STUDIES, load_study
from lora_course.lab.tasks import load_task
from tools import other_seeds

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
TEXTS = {path.stem: path.read_text() for path in NOTEBOOKS.glob("[0-9]*.md")}


def run(bits: float, exact: float, **more: object) -> dict:
    return {"bits_per_token": bits, "exact": exact, "parameters": 2_500_000} | more


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two seeds: DoRA lower with both, AdaLoRA with one; nested lower than the cuts on average and not at rank 1."""
    runs = {"base/test": run(4.35, 0.0)}
    for seed, shift in ((0, 0.0), (1, 0.1)):
        cuts = {"1": 0.5 + shift, "2": 0.4 + shift, "4": 0.3 + shift}
        runs[f"lora/0.002/{seed}/test"] = run(0.3 + shift, 0.5, cut=cuts)
        runs[f"dora/0.004/{seed}/test"] = run(0.25 + 0.9 * shift, 0.6)
        runs[f"adalora/0.004/{seed}/test"] = run(0.35, 0.5)
        nested = {"1": 0.55 + shift, "2": 0.2 + shift, "4": 0.2 + shift}
        runs[f"nested/0.002/{seed}/test"] = run(0.3, 0.5, cut=nested)
    settings = {"seeds": [0, 1], "task": "past", "words": {"test": 400}}
    text = {"study": "smol_past", "settings": settings, "runs": runs, "made": []}
    shutil.copy(STUDIES / "tasks_nano.json", tmp_path)
    (tmp_path / "smol_past.json").write_text(json.dumps(text))
    for module in (chat_model, chat_model.load_study.__globals__):
        names = module if isinstance(module, dict) else vars(module)
        monkeypatch.setitem(names, "STUDIES", tmp_path)
    return tmp_path


def with_nano(holds: bool, id: str) -> Claims:
    claims = Claims("5_1_comparison", "tiny")
    claims.add(
        QUESTIONS[id].nano, "on nano", "here", "lower", {"x": [1.0]}, f"x[0] {'>' if holds else '<'} 0", "why"
    )  # fmt: skip
    return claims


def test_a_row_says_which_is_ahead_and_whether_the_verdict_is_nanos(record: Path) -> None:
    for holds, said in ((True, BOTH), (False, "on nano not with every seed")):
        claims = with_nano(holds, "5.1-s")
        (row,) = answer(claims, "5.1-s")
        assert re.match(rf"{said} \(<a href=.*5\.1-c</a>; here <a href=.*5\.1-s</a>\)$", row[2])
        assert row[1] == (
            "Lower with all 2 seeds: DoRA, by 0.055 bits an answer token (0.050 to 0.060; training gained 4.0). "
            "60% against 50% of unseen verbs right (a rule of three lines: 93%)."
        )
        assert claims.claims[-1].holds and claims.claims[-1].evidence == "smol"
    for holds, said in (
        (False, "AdaLoRA: not ahead on nano either"),
        (True, "<b>unlike nano</b>: AdaLoRA ahead on nano"),
    ):  # lower with one seed of two
        (row,) = answer(with_nano(holds, "1.2-s"), "1.2-s")
        assert row[2].startswith(f"{said} (") and row[1].startswith(
            "No difference shown: AdaLoRA 0.000 bits an answer token lower (2 seeds: -0.050 to +0.050; training"
        )


def of_rules(study: str) -> float:
    """The share of a study's test words that a rule of three lines has right, or the mean of that and of a suffix table."""
    settings = load_study(study)["settings"]
    shares = []
    for task in settings.get("tasks", ["past"]):
        rule = (
            rule_of_three
            if task == "past"
            else suffix_table(task, load_task(task, "train").to_list())
        )
        words = load_task(task, "test").to_list()[: settings["words"]["test"]]
        shares.append(statistics.fmean(rule(word) in word["accepted"] for word in words))
    return statistics.fmean(shares)


@pytest.mark.parametrize("study", [chat_model.PAST, chat_model.SEVERAL])
def test_rows_with_right_answers_have_a_rules_share_of_the_same_words(study: str) -> None:
    wanted, told = of_rules(study), 0
    assert chat_rules.rule_right(load_study(study)) == pytest.approx(wanted)
    for id in (id for id, question in QUESTIONS.items() if question.study == study):
        (row,) = answer(with_nano(True, id), id)
        asked = re.search(r"\d+% against \d+% of unseen .* right (.*)", row[1])
        told += asked is not None
        assert asked is None or re.fullmatch(rf"\(a rule[a-z ]*: {wanted:.0%}\)\.", asked[1])
    assert told >= 4


def test_a_claim_says_where_the_lowest_or_the_highest_of_the_values_tried_was_the_best() -> None:
    said = {}
    for id in QUESTIONS:
        claims = with_nano(True, id)
        answer(claims, id)
        said[id] = re.split(r"On nano \S+: .*?\.(?: |$)", claims[id].explanation)[-1]
    edge = "0.5 for average is the lowest value tried; a lower one may be better."
    assert {id: text for id, text in said.items() if text} == {"2.1-s": edge}


def test_a_row_says_what_nano_compared_where_that_was_another_pair(record: Path) -> None:
    path = record / "smol_past.json"
    text = json.loads(path.read_text())
    for seed in (0, 1):
        text["runs"][f"gates/0.004/{seed}/test"] = run(0.5, 0.5)
    path.write_text(json.dumps(text))
    other = "; there from rank 8, half of it closed: ahead with five seeds and not with five others; from rank 12 not (5.1-e) ("
    (row,) = answer(with_nano(False, "4.1-t"), "4.1-t")
    assert row[2].startswith(f"gates: not ahead on nano either{other}")
    (row,) = answer(with_nano(True, "4.1-t"), "4.1-t")  # which other seeds refute
    assert row[2].startswith(f"gates: not ahead on nano either{other}")


def test_a_row_names_the_second_where_that_is_lower_and_says_by_how_much(record: Path) -> None:
    path = record / "smol_past.json"
    text = json.loads(path.read_text())
    for key, found in text["runs"].items():
        found["bits_per_token"] += 0.2 * key.startswith("dora/")
    path.write_text(json.dumps(text))
    (row,) = answer(with_nano(True, "5.1-s"), "5.1-s")
    assert row[2].startswith("<b>unlike nano</b>: DoRA ahead on nano (") and row[1].startswith(
        "Lower with all 2 seeds: LoRA, by 0.145 bits an answer token (0.140 to 0.150; training"
    )


def test_a_row_has_its_own_claims_verdict_whatever_claims_stand_behind_it(record: Path) -> None:
    claims = with_nano(True, "5.1-s")
    claims.add("5.1-z", "later in the order", "here", "higher", {"x": [1.0]}, "x[0] < 0", "why")
    (row,) = answer(claims, "5.1-s")
    assert row[2].startswith(f"{BOTH} (")
    assert claims["5.1-s"].holds and not claims["5.1-z"].holds
    with pytest.raises(KeyError):
        claims["5.1-y"]


def test_the_table_has_loras_level_and_the_others_paired_differences(record: Path) -> None:
    path = record / "smol_past.json"
    text = json.loads(path.read_text())
    for key, found in text["runs"].items():
        if key == "base/test":
            continue
        arm, _, seed, _ = key.split("/")
        lost = {
            "lora": [1.1, 1.3],
            "dora": [1.0, 1.25],
            "adalora": [1.2, 1.1],
            "nested": [1.2, 1.5],
        }
        found |= {"irregular": 0.25, "own_text": lost[arm][int(seed)]}
    text["runs"]["gates/0.002/0/test"] = run(0.3, 0.5)  # its second seed has not run
    table = chat_model.results(text, {"dora": "D<o>RA"})
    found = {
        row[0]: tuple(cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row[1:])
        for row in table.rows
    }
    assert list(found)[0] == "D&lt;o&gt;RA" and list(found)[-1] == "lora"  # the lowest first
    assert found["lora"] == ("50.0% (25.0%)", "0.350 itself", "1.200 itself", "10.0")
    assert found["D&lt;o&gt;RA"][:2] == ("60.0% (25.0%)", "-0.055 (-0.060 to -0.050)")
    assert found["adalora"][2] == "-0.050 (-0.200 to +0.100)"
    page = table._repr_html_()  # on a phone there is no head, and each cell says what it is
    assert (
        '<td>lora</td><td data-head="exactly right (irregular)">50.0%\N{NO-BREAK SPACE}(25.0%)</td>'
        in page
    )
    assert page.count("data-head=") == 4 * len(found)
    assert chat_model.one_sided(text, "bits_per_token") == (["dora"], [])
    assert chat_model.one_sided(text, "own_text") == (["dora"], ["nested"])


@pytest.mark.parametrize(("arm", "each"), [("lora", 4), ("delta", 8), ("factors-2bit", 0.3125)])
def test_bytes_of_a_number_are_those_of_the_file(arm: str, each: float, tmp_path: Path) -> None:
    settings = smol_past.SETTINGS | {"model": "nano"}
    made = METHODS[arm](settings, 0)
    made.save(made.model, tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    numbers = made.parameters(made.model)
    assert (path.stat().st_size - header) / numbers == pytest.approx(each, rel=1e-3)
    runs = {f"{arm}/0.002/{seed}/test": {"parameters": seed * numbers} for seed in (1, 3)}
    record = {"study": "smol_past", "settings": {"seeds": [1, 3]}, "runs": runs}
    assert chat_model.adapter_bytes(record, arm) == 2 * numbers * each


def test_values_inside_a_run_are_averaged_seed_by_seed(record: Path) -> None:
    claims = with_nano(False, "4.2-s")
    (row,) = answer(claims, "4.2-s")
    assert row[2].startswith("on nano not with every seed; there by truncation (")
    assert row[1].startswith("Lower with all 2 seeds: nested (Matryoshka), by 0.083 bits")
    assert claims.claims[-1].values["svd"] == pytest.approx([0.4, 0.5])


def test_what_has_not_run_is_named_and_claims_nothing(record: Path) -> None:
    assert missing("3.1-s") == ["adaptive"] and missing("5.1-s") == []
    assert missing("2.1-s") == ["router", "average"]  # no record at all
    claims = with_nano(True, "3.1-s")
    assert answer(claims, "3.1-s")[0][1:] == ("not measured yet", "<code>smol_past</code> still lacks adaptive")  # fmt: skip
    assert len(claims.claims) == 1
    path = record / "smol_past.json"
    text = json.loads(path.read_text())
    del text["runs"]["dora/0.004/1/test"]  # one seed short
    path.write_text(json.dumps(text))
    assert missing("5.1-s") == ["dora"]


@pytest.mark.parametrize("id", QUESTIONS)
def test_each_question_names_arms_of_its_study_and_a_claim_of_its_chapter(id: str) -> None:
    question = QUESTIONS[id]
    several = Path(smol_several.__file__).read_text()
    for path in (path for paths in question.arms.values() for path in paths):
        arm = path.split("/")[0]
        assert arm in METHODS if question.study == "smol_past" else f'"{arm}"' in several
    (chapter,) = [text for stem, text in TEXTS.items() if f'chat_model.answer(claims, "{id}"' in text or f', "{id}"' in text]  # fmt: skip
    assert re.search(rf'^    "{question.nano}"', chapter, re.MULTILINE)
    assert len(question.arms) == 2 and set(question.arms) <= set(re.findall(r"\w+", question.rule))
    with pytest.raises(KeyError):
        series({"study": "smol_past", "settings": {"seeds": [0]}, "runs": {}}, ["lora"])


def test_what_other_seeds_refute_does_not_hold_on_nano() -> None:
    tried = other_seeds.verdicts()
    for id, question in chat_model.QUESTIONS.items():
        again = tried.get(question.nano, {"held": False, "holds": True})
        assert question.refuted == (again["held"] and not again["holds"]), id
