"""Studies trained on other seeds, and chapters that judge their claims on them."""

import json
import random
import re
from pathlib import Path
from statistics import fmean

import pytest

from lora_course.experiments.study import Study, Witness
from tests.toy_chapter import FRONT_MATTER
from tools import other_seeds
from tools.chapters import ROOT, Result, key
from tools.ledger import claim_row, on_other_seeds
from tools.other_seeds import judge, others, train

SEEDS = (5, 6, 7, 8, 9)
TOY = (
    FRONT_MATTER
    + """# A toy

```{code-cell} ipython3
import json, os, pathlib, lora_course
record = json.loads(pathlib.Path(lora_course.__file__).with_name("data").joinpath("studies/toy.json").read_text())
losses = [record["runs"][f"lora/1/{seed}/test"]["loss"] for seed in record["settings"]["seeds"]]
fields = dict(statement="", source="", expected="", outcome="")
claims = [
    fields | dict(id="9.9-a", predicate="mean(l) < 10", values={"l": losses}, holds=sum(losses) / 5 < 10),
    fields | dict(id="9.9-b", predicate="x > 1", values={"x": [2.0]}, holds=True),
    fields | dict(id="9.9-c", predicate="d > 0", values={"d": losses + losses, "none": []}, holds=True),
]
```

```{code-cell} ipython3
assert sum(losses) / 5 < 10
```

```{code-cell} ipython3
from lora_course.lab import claims as lab_claims
assert lab_claims.flips("x > 1 and x < 0", {"x": [2.0]})
pathlib.Path(os.environ["LORA_COURSE_CLAIMS"], "9_9_toy.json").write_text(json.dumps({"claims": claims}))
```
"""
)


def toy(tmp_path: Path, seeds: tuple[int, ...], losses: list[float]) -> Path:
    runs = {f"lora/1/{s}/test": {"loss": loss} for s, loss in zip(seeds, losses)}
    path = tmp_path / "toy.json"
    path.write_text(json.dumps({"study": "toy", "settings": {"seeds": seeds}, "runs": runs}))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with one chapter, which was executed on the seeds 0 to 4."""
    root = tmp_path / "root"
    studies = root / "lora_course" / "data" / "studies"
    studies.mkdir(parents=True)
    (root / "lora_course" / "__init__.py").touch()
    (root / "lora_course" / "lab").mkdir()
    (root / "lora_course" / "lab" / "__init__.py").touch()
    (root / "lora_course" / "lab" / "claims.py").write_text("def flips(*_): return False\n")
    (root / "requirements.txt").touch()
    (root / "notebooks").mkdir()
    chapter = root / "notebooks" / "9_9_toy.md"
    chapter.write_text(TOY)
    toy(tmp_path, (0, 1, 2, 3, 4), [1.0, 2.0, 3.0, 4.0, 5.0]).rename(studies / "toy.json")
    executed = root / "build" / "executed" / f"9_9_toy-{key(chapter, root)[:16]}"
    (executed / "claims").mkdir(parents=True)
    (executed / "run.json").write_text('{"seconds": 1.0}')
    fields = {"statement": "", "source": "", "expected": "", "outcome": ""}
    claims = [
        fields | {"id": "9.9-a", "predicate": "mean(l) < 10", "values": {"l": [1.0, 2.0, 3.0, 4.0, 5.0]}, "holds": True},
        fields | {"id": "9.9-b", "predicate": "x > 1", "values": {"x": [2.0]}, "holds": True},
        fields | {"id": "9.9-c", "predicate": "d > 0", "values": {"d": [1.0, 2.0, 3.0, 4.0, 5.0] * 2, "none": []}, "holds": True},
    ]  # fmt: skip
    (executed / "claims" / "9_9_toy.json").write_text(json.dumps({"claims": claims}))
    return root


def test_a_chapter_judges_on_the_other_seeds_what_rests_on_seeds_though_a_cell_raises(
    root: Path, tmp_path: Path
) -> None:
    records = tmp_path / "records"
    records.mkdir()
    toy(tmp_path, SEEDS, [30.0, 1.0, 1.0, 30.0, 1.0]).rename(records / "toy.json")
    found = judge.judge("9_9_toy", records, root)
    assert found == {
        "9.9-a": {"held": True, "holds": False, "values": {"l": [30.0, 1.0, 1.0, 30.0, 1.0]}},
        "9.9-c": {"held": True, "holds": True, "values": {"d": [30.0, 1.0, 1.0, 30.0, 1.0] * 2, "none": []}},
    }  # fmt: skip
    here = json.loads((root / "lora_course" / "data" / "studies" / "toy.json").read_text())
    assert here["settings"]["seeds"] == [0, 1, 2, 3, 4]  # the checkout's own record stays


def test_a_chapter_that_was_not_executed_or_loses_a_claim_is_told_of(
    root: Path, tmp_path: Path
) -> None:
    records = tmp_path / "records"
    records.mkdir()
    toy(tmp_path, SEEDS[:4], [1.0] * 4).rename(records / "toy.json")
    broken = json.loads((records / "toy.json").read_text())
    broken["settings"]["seeds"] = list(SEEDS)  # a run is missing: the claims' cell raises
    (records / "toy.json").write_text(json.dumps(broken))
    with pytest.raises(
        ValueError, match=r"said nothing of 9\.9-a, 9\.9-b, 9\.9-c .*KeyError.*lora/1/9"
    ):
        judge.judge("9_9_toy", records, root)
    (said,) = (root / "build" / "executed").rglob("9_9_toy.json")
    said.write_text(said.read_text().replace('"holds": true', '"holds": false'))
    assert judge.judge("9_9_toy", records, root) == {}  # what did not hold has nothing to lose
    (root / "requirements.txt").write_text("other")
    with pytest.raises(ValueError, match="execute 9_9_toy first"):
        judge.judge("9_9_toy", records, root)


def test_a_study_is_trained_on_the_other_seeds_beside_the_courses_record(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def body(runs):
        for seed in runs.seeds:
            runs(f"lora/1/{seed}/test", lambda seed=seed: asked.append(seed) or {"loss": random.Random(seed).random()})  # fmt: skip

    class Here(Study):
        path = tmp_path / "own.json"

    study = Here("toy", {"seeds": [0]}, body, Witness((), {}))
    study.run(study.path, seeds=[0, 10])  # more than the study asks for
    monkeypatch.setattr(train, "get", lambda name: study)
    own = study.path.read_text()
    for _ in range(2):  # the second goes on where nothing is left
        record = json.loads(train.train("toy", tmp_path / "records").read_text())
    assert asked == [0, 10, 5, 15] and others([0, 1, 2, 3, 4]) == list(SEEDS)
    assert record["settings"]["seeds"] == [5, 15] and study.path.read_text() == own
    assert {f"lora/1/{seed}/test" for seed in (0, 10, 5, 15)} == set(record["runs"])
    monkeypatch.setattr(train, "get", lambda name: Study("still", {}, body, Witness((), {})))
    with pytest.raises(ValueError, match="still draws nothing"):
        train.train("still", tmp_path / "records")


def test_verdicts_of_a_chapter_replace_its_own_alone(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    judge.keep("1_1_qlora", {"1.1-a": {"held": True, "holds": True, "values": {}}}, path)
    judge.keep("1_2_adalora", {"1.2-a": {"held": True, "holds": False, "values": {}}}, path)
    judge.keep("1_1_qlora", {"1.1-b": {"held": True, "holds": True, "values": {}}}, path)
    assert list(other_seeds.verdicts(path)) == ["1.1-b", "1.2-a"]


def test_the_ledger_counts_what_stays_and_names_what_turns(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    (folder,) = (root / "build" / "executed").iterdir()
    results = [Result("9_9_toy", folder, 1.0, fresh=True)]
    monkeypatch.setattr(other_seeds, "verdicts", dict)
    assert on_other_seeds(results) == "No claim has been tried on other seeds yet."
    again = {"9.9-a": {"held": True, "holds": False, "values": {"l": [30.0]}},
             "9.9-b": {"held": True, "holds": True, "values": {"x": [3.0]}}}  # fmt: skip
    monkeypatch.setattr(other_seeds, "verdicts", lambda: again)
    text = on_other_seeds(results)
    assert (
        "2 were tried so far" in text
        and "(5 to 9 where the course has 0 to 4): 1 hold there too, [9.9-a]" in text
    )
    assert "not; these count as seen since. So 50% held as they were called at first." in text
    assert "do not hold" not in text
    again["9.9-b"]["holds"], again["9.9-a"]["holds"] = False, True
    (path,) = (folder / "claims").iterdir()
    path.write_text(
        path.read_text().replace(
            '"x > 1", "values": {"x": [2.0]}, "holds": true',
            '"x > 1", "values": {"x": [2.0]}, "holds": false',
        )
    )
    assert "1 hold there too. Of 1 that do not hold, none would there." in on_other_seeds(results)
    again["9.9-a"]["holds"] = False
    (claim,) = [c for c in judge.by_id(folder / "claims").values() if c.id == "9.9-a"]
    row = claim_row(claim, "9_9_toy", again["9.9-a"])
    assert "| with other seeds | does not hold<br>l: 30 |" in row
    assert "with other seeds" not in claim_row(claim, "9_9_toy")


def test_a_claim_that_other_seeds_break_is_called_seen_in_its_chapter() -> None:
    chapters = "".join(path.read_text() for path in (ROOT / "notebooks").glob("[0-9]*.md"))
    broken = [id for id, c in other_seeds.verdicts().items() if c["held"] and not c["holds"]]
    assert broken  # 1.2-d is one
    for id in broken:
        stated = re.search(rf'claims\.add\(\n    "{re.escape(id)}",.*?\n\)', chapters, re.DOTALL)
        assert stated and re.search(r'kind="(observation|chosen)"|\*\*chosen', stated[0]), id


@pytest.mark.parametrize(
    ("id", "first", "second", "stem", "words", "counted"),
    [
        ("1.2-d", "importance", "at_random", "1_2_adalora", "Of five other seeds one has it the other way", 1),
        ("3.1-d", "not_grown", "grown", "3_1_adaptive", "Of five other seeds two have it so", 3),
        ("4.1-c", "masked", "lora", "4_1_sparse", "With two of five other seeds it is the other way", 2),
        ("4.1-f", "gates", "lora", "4_1_sparse", "With three of five other seeds it is the other way", 3),
    ],
)  # fmt: skip
def test_what_a_page_says_of_other_seeds_is_what_came_out(
    id: str, first: str, second: str, stem: str, words: str, counted: int
) -> None:
    values = other_seeds.verdicts()[id]["values"]
    turned = [one > two for one, two in zip(values[first], values[second], strict=True)]
    assert len(turned) == 5 and sum(turned) == counted
    claim = (ROOT / "notebooks" / f"{stem}.md").read_text().split(f'"{id}"')[1]
    assert words in claim.split("claims.add(")[0]


def test_a_bound_that_other_seeds_pass_is_said_where_it_stands() -> None:
    values = other_seeds.verdicts()["4.2-e"]["values"]
    passed = [rank for rank in (1, 2, 4, 8) if fmean(values[f"difference_{rank}"]) > 0.05]
    assert passed == [8]  # the largest rank
    text = (ROOT / "notebooks" / "4_2_hierarchical.md").read_text()
    assert "with five other seeds truncation does not at the largest rank" in text


def test_what_a_clock_decides_is_not_tried_on_other_seeds() -> None:
    for id in judge.TIMED:
        stem = next((ROOT / "notebooks").glob(f"{id.split('-')[0].replace('.', '_')}_*.md"))
        stated = stem.read_text().split(f'"{id}"')[1].split("claims.add(")[0]
        assert "takes more time" in stated and id not in other_seeds.verdicts()
