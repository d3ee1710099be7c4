"""Claims: predicates over raw values, verdicts that could have been otherwise, and the file they end in."""

import json
import math

import pytest

from lora_course.lab.claims import Claim, Claims, evaluate, flips, load_claims, perturbations

VALUES = {"lora": [2.0, 2.2, 2.1], "qlora": [2.05, 2.21, 2.16]}


def added(predicate: str, values=VALUES, id: str = "1", **kwargs) -> Claim:
    return Claims("0_0_test").add(
        id, "QLoRA is as good as LoRA", "arXiv 2305.14314", "equal", values, predicate, **kwargs
    )


@pytest.mark.parametrize(
    ("predicate", "holds"),
    [
        ("mean(qlora) < 1.05 * mean(lora)", True),
        ("all(q < p for p, q in zip(lora, qlora))", False),
        ("max(lora) - min(lora) > std(qlora)", True),
        ("sorted(lora)[1] == 2.1 and len(lora) == 3 and 2 < sum(lora) / len(lora) < 3", True),
        ("any(abs(x - 2.2) < 1e-9 for x in qlora)", False),
    ],
)
def test_a_predicate_is_evaluated_over_the_raw_values(predicate, holds) -> None:
    assert added(predicate).holds is holds


@pytest.mark.parametrize(
    ("predicate", "message"),
    [
        ("open('x') is None", "uses open"),
        ("().__class__ == 1", "Attribute"),
        ("(lambda: True)()", "Lambda"),
        ("(y := 1) == 1", "NamedExpr"),
        ("mean(loara) < 1", "uses loara; it knows the values lora, qlora"),
        ("mean(lora)", "came to 2.1"),
        ("lora <", "not a Python expression"),
        ("lora < 3", r"each value is a list.*mean\("),
    ],
)
def test_what_is_no_plain_predicate_is_refused(predicate, message) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(predicate, VALUES)


@pytest.mark.parametrize(
    "predicate",
    [
        "len(lora) == 3",
        "mean(lora) == mean(lora)",
        "min(lora) <= max(lora)",
        "1 < 2",
        "std(lora) >= 0",
    ],
)
def test_a_check_that_cannot_fail_is_refused(predicate) -> None:
    with pytest.raises(ValueError, match="no change of the values turns the verdict"):
        added(predicate)


def test_flips_tells_a_check_from_none() -> None:
    claim = added("mean(qlora) < mean(lora)")
    assert not claim.holds and flips(claim)
    always = Claim("2", "", "", "", "len(lora) > 0", VALUES, "", True)
    assert not flips(always)
    division = added(
        "1 / (mean(qlora) - mean(lora)) > 0"
    )  # swapping and zeroing may divide by zero: passed over
    assert flips(division)


def test_every_series_is_perturbed_and_the_given_values_stay() -> None:
    changed = perturbations(VALUES)
    assert all(any(values[name] != VALUES[name] for values in changed) for name in VALUES)
    assert {"lora": VALUES["qlora"], "qlora": VALUES["lora"]} in changed
    assert VALUES == {"lora": [2.0, 2.2, 2.1], "qlora": [2.05, 2.21, 2.16]}


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_empty_and_non_finite_values_are_refused(bad) -> None:
    with pytest.raises(ValueError, match="claim 1: lora="):
        added("mean(qlora) < mean(lora)", {**VALUES, "lora": bad})


@pytest.mark.parametrize("name", ["mean", "not a name"])
def test_a_name_that_hides_a_function_or_is_none_is_refused(name) -> None:
    with pytest.raises(ValueError, match="can't name a value"):
        added("1 < 2", {name: [1.0]})


def test_the_row_says_what_came_out_and_whether_it_holds_in_words() -> None:
    claim = added("mean(qlora) < mean(lora)", explanation="Three seeds are too few.")
    text = claim._repr_markdown_()
    assert "✗ does not hold here" in text and "Three seeds are too few." in text
    assert "lora 2.1 ± 0.1 (n = 3)" in text and "qlora 2.14 ± 0.082 (n = 3)" in text
    assert "✓ holds" in added("mean(qlora) > mean(lora)")._repr_markdown_()
    assert added("mean(bits) < 5", {"bits": 4.127}).outcome == "bits 4.127"
    assert added("mean(bytes) > 5", {"bytes": 6525288448}).outcome == "bytes 6,525,288,448"
    assert added("mean(steps) > 5", {"steps": [1000, 1500]}).outcome == "steps 1250 ± 354 (n = 2)"


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
    }  # fmt: skip
    assert {"torch", "transformers", "peft"} <= set(record["versions"])
    (chapter,) = load_claims(path.parent)
    assert chapter["chapter"] == "0_0_test" and chapter["claims"] == claims.claims
    assert all(flips(claim) for claim in chapter["claims"])


def test_a_cell_that_is_run_twice_replaces_its_claim() -> None:
    claims = Claims("0_0_test")
    for value in (1.0, 3.0):
        claims.add("a", "s", "own", "e", {"x": [value]}, "mean(x) > 2")
    assert [claim.holds for claim in claims.claims] == [True]


def test_the_table_is_html_with_escaped_text_and_words_for_verdicts() -> None:
    claims = Claims("0_0_test")
    claims.add("a", "4 < 5 & more", "own", "e", {"x": [1.0]}, "mean(x) > 2", "too small")
    table = claims.table()
    assert (
        "4 &lt; 5 &amp; more" in table._repr_html_()
        and "✗ does not hold: too small" in table._repr_html_()
    )
    assert '<th scope="col"' in table._repr_html_()
    assert "a | 4 < 5 & more | own" in str(table)
