"""Claims: verdicts over raw values, the table they stand in, and the file they end in."""

import json
import math

import pytest

from lora_course.lab.claims import (
    BOOK,
    Claim,
    Claims,
    ClaimTable,
    load_claims,
)

VALUES = {"lora": [2.0, 2.2, 2.1], "qlora": [2.05, 2.21, 2.16]}


def added(predicate: str, values=VALUES, id: str = "1", **kwargs) -> Claim:
    claims = Claims("0_0_test", profile="tiny")
    shown = claims.add(
        id, "QLoRA is as good as LoRA", "arXiv 2305.14314", "equal", values, predicate, **kwargs
    )
    assert shown is None, "a claim is shown once, in the table"
    return claims.claims[-1]


def test_a_claim_that_cannot_fail_is_refused() -> None:
    with pytest.raises(ValueError, match="no change of the values turns the verdict"):
        added("len(lora) == 3")


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_empty_and_non_finite_values_are_refused(bad) -> None:
    with pytest.raises(ValueError, match="claim 1: lora="):
        added("mean(qlora) < mean(lora)", {**VALUES, "lora": bad})


@pytest.mark.parametrize("name", ["mean", "not a name"])
def test_a_name_that_hides_a_function_or_is_none_is_refused(name) -> None:
    with pytest.raises(ValueError, match="can't name a value"):
        added("1 < 2", {name: [1.0]})


def test_a_claim_says_what_came_out_and_whether_it_holds_in_words() -> None:
    claim = added("mean(qlora) < mean(lora)", explanation="Three seeds are too few.")
    assert claim.verdict == "✗ does not hold here"
    assert claim.outcome == "lora 2.1 (2 to 2.2, n = 3); qlora 2.14 (2.05 to 2.21, n = 3)"
    assert added("mean(qlora) > mean(lora)").verdict == "✓ holds"
    assert added("mean(bits) < 5", {"bits": 4.127}).outcome == "bits 4.127"
    assert added("mean(bytes) > 5", {"bytes": 6525288448}).outcome == "bytes 6,525,288,448"
    outcome = added("mean(steps) > 5", {"steps": [1000, 1500]}).outcome
    assert outcome == "steps 1250 (1000 to 1500, n = 2)"


def test_an_observation_is_no_verdict_and_a_choice_is_named() -> None:
    seen = added(
        "mean(qlora) > mean(lora)", kind="observation", evidence="smol", effect="0.04 bits"
    )
    assert seen.verdict == "✓ seen"
    (row,) = ClaimTable([seen])._repr_html_().split("<tbody>")[1].split("</tbody>")[:1]
    assert (
        "few seeds, one machine, no interval, or not with other seeds, on SmolLM2-135M" in row
        and "0.04 bits" in row
    )
    assert "chosen after seeing" in repr(ClaimTable([added("mean(qlora) > 2", kind="chosen")]))
    with pytest.raises(ValueError, match="kind='guess'; choose one of claim, observation, chosen"):
        added("mean(qlora) > 2", kind="guess")
    with pytest.raises(ValueError, match="evidence='7B'; choose one of tiny, smol, gpu"):
        added("mean(qlora) > 2", evidence="7B")


@pytest.mark.parametrize(
    ("profile", "evidence"), [("tiny", "tiny"), ("smol", "smol"), ("t4", "gpu"), ("large", "gpu")]
)
def test_what_a_claim_rests_on_is_what_the_profile_runs(profile, evidence) -> None:
    claims = Claims("0_0_test", profile=profile)
    claims.add("a", "s", "own", "e", {"x": [1]}, "mean(x) > 2")
    assert claims.claims[0].evidence == evidence


def test_saved_claims_are_read_back_whole(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LORA_COURSE_CLAIMS", str(tmp_path / "made"))
    claims = Claims("0_0_test", profile="tiny")
    claims.add("a", "s", "own", "e", VALUES, "mean(qlora) > mean(lora)")
    claims.add("b", "s", "own", "e", {"x": [1]}, "mean(x) > 2", "why")
    path = claims.save()
    assert path == tmp_path / "made" / "0_0_test.json"
    assert [file.name for file in path.parent.iterdir()] == ["0_0_test.json"]
    record = json.loads(path.read_text())
    assert set(record) == {"chapter", "profile", "versions", "claims"}
    assert set(record["claims"][0]) == {
        "id", "statement", "source", "expected", "predicate", "values", "outcome", "holds", "explanation",
        "kind", "evidence", "effect",
    }  # fmt: skip
    assert {"torch", "transformers", "peft"} <= set(record["versions"])
    (chapter,) = load_claims(path.parent)
    assert chapter["chapter"] == "0_0_test" and chapter["claims"] == claims.claims


def test_a_cell_that_is_run_twice_replaces_its_claim() -> None:
    claims = Claims("0_0_test")
    for value in (1.0, 3.0):
        claims.add("a", "s", "own", "e", {"x": [value]}, "mean(x) > 2")
    assert [claim.holds for claim in claims.claims] == [True]


def test_a_record_of_before_kinds_were_kept_is_read_as_claims_on_nano(tmp_path) -> None:
    old = {
        "id": "1", "statement": "s", "source": "own", "expected": "e", "predicate": "mean(x) > 2",
        "values": {"x": [3.0]}, "outcome": "x 3", "holds": True, "explanation": "",
    }  # fmt: skip
    (tmp_path / "0_0_test.json").write_text(json.dumps({"chapter": "0_0_test", "claims": [old]}))
    (claim,) = load_claims(tmp_path)[0]["claims"]
    assert (claim.kind, claim.evidence, claim.effect) == ("claim", "tiny", "")


def test_the_table_has_a_row_a_claim_with_anchor_and_link_to_the_ledger() -> None:
    claims = Claims("0_0_test")
    claims.add("2.1-a", "4 < 5 & more", "own", "e", {"x": [1.0]}, "mean(x) > 2", "too small")
    table = claims.table()
    page = table._repr_html_()
    assert "4 &lt; 5 &amp; more" in page and "✗ does not hold here" in page
    assert '<tr id="claim-2-1-a">' in page and '<th scope="col"' in page
    assert f'<a href="{BOOK}/book/ledger.html#claim-2-1-a">2.1-a</a>' in page
    assert repr(table).splitlines()[1] == "2.1-a | ✗ does not hold here | 4 < 5 & more | x 1"


def test_the_table_is_folded_under_a_line_that_counts_and_names_what_failed() -> None:
    claims = Claims("0_0_test")
    for id, value, kind in [("2.1-a", 3, "claim"), ("2.1-b", 1, "claim"), ("2.1-c", 3, "observation"), ("2.1-d", 3, "chosen")]:  # fmt: skip
        claims.add(id, "s", "own", "e", {"x": [value]}, "mean(x) > 2", "why", kind=kind)
    line = "4 claims: 1 ✓ holds · 1 ✗ does not hold here (2.1-b) · 2 ✓ seen"
    page = claims.table()._repr_html_()
    assert page.startswith(f'<details class="claims"><summary>{line}</summary>')
    assert page.endswith("</details>") and page.count("<tr id=") == 4


def test_answers_at_the_head_lead_to_their_claims() -> None:
    claims = Claims("0_0_test")
    claims.add("2.1-a", "s", "own", "e", {"x": [1.0]}, "mean(x) > 2", "too small")
    claims.add("2.1-b", "s", "own", "e", {"x": [3.0]}, "mean(x) > 2")
    assert claims.verdicts() == {"2.1-a": "<b>no</b>", "2.1-b": "yes"}
    link = claims.link("2.1-a")
    table = claims.answers(("question", "found"), [("Does it?", f"<b>no</b> ({link})")])
    page = table._repr_html_()
    assert '<td>Does it?</td><td><b>no</b> (<a href="#claim-2-1-a">2.1-a</a>)</td>' in page
    assert repr(table) == "question | found\nDoes it? | no (2.1-a)"
    wide = claims.answers(("what", "how", "size & <i>cost</i>", "line"), [("a", "b", "1", "c")])
    page = wide._repr_html_()  # on a phone there is no head above the cells
    assert '<td>a</td><td>b</td><td data-head="size &amp; cost">1</td><td data-head="line">' in page
    with pytest.raises(ValueError, match=r"'Does it\?' has 1 cells; expected 2: question, found"):
        claims.answers(("question", "found"), [("Does it?",)])


def test_claims_stand_in_the_order_of_their_ids_whatever_was_checked_first() -> None:
    claims = Claims("0_0_test")
    for id in ("2.1-c", "2.1-a", "2.1-b", "2.1-a"):
        claims.add(id, "s", "own", "e", {"x": [1.0]}, "mean(x) > 2", "too small")
    assert [claim.id for claim in claims.claims] == ["2.1-a", "2.1-b", "2.1-c"]
