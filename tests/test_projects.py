"""Every chapter's open exercise is a project with a rubric and two graded answers, and no number in them is typed."""

import re
from pathlib import Path
from statistics import fmean

import pytest

from lora_course.lab import study
from tools import crosslinks, pages, project_numbers, projects
from tools.chapters import ROOT, chapters

STEMS = [path.stem for path in chapters(ROOT) if path.stem != "5_1_comparison"]
PROJECTS = {project["chapter"]: project for project in projects.projects(ROOT)}
OPEN = re.compile(r"^\*\*Exercise (\d\.\d-\w): ([^*]+)\*\* \(open, ([^)]+)\)\.(.*)$", re.MULTILINE)
GRADED = re.compile(r"^\*Graded (\d+) of (\d+)\*: (.*)$", re.MULTILINE)


@pytest.fixture(scope="module")
def page() -> str:
    return pages.fill((ROOT / "book" / "projects.md").read_text(), ROOT, [])


def open_exercise(stem: str) -> re.Match[str]:
    """The chapter's last exercise, which is its open one."""
    text = (ROOT / "notebooks" / f"{stem}.md").read_text()
    found = list(OPEN.finditer(text))
    assert len(found) == 1, f"{stem}: one open exercise"
    assert text.rfind("**Exercise ") == found[0].start()
    return found[0]


def test_every_chapter_has_its_project_in_order() -> None:
    assert list(PROJECTS) == STEMS
    assert list(project_numbers.NUMBERS) == [project["number"] for project in PROJECTS.values()]


@pytest.mark.parametrize("stem", STEMS)
def test_the_chapters_open_exercise_is_the_project_and_links_to_it(stem: str, page: str) -> None:
    number, name, time, text = open_exercise(stem).groups()
    project = PROJECTS[stem]
    assert (number, name, time) == (project["exercise"], project["name"], project["time"])
    anchor = projects.anchor(project["number"])
    assert f"[Rubric and two graded answers](../book/projects.md#{anchor})" in text
    assert page.count(f"({anchor})=\n## {project['number']} ") == 1
    assert f'href="../book/projects.html#{anchor}"' in crosslinks.for_book(text, stem, "", set())


@pytest.mark.parametrize("stem", STEMS)
def test_points_fit_the_rubric_and_tell_the_answers_apart(stem: str) -> None:
    totals = {}
    for sample in projects.SAMPLES:
        points = PROJECTS[stem][sample]["points"]
        assert tuple(points) == projects.LINES
        assert all(given in range(projects.MOST + 1) for given, _ in points.values())
        assert all(len(why) > 10 and not why.endswith(".") for _, why in points.values())
        totals[sample] = sum(given for given, _ in points.values())
    assert totals["good"] >= 10 and 4 <= totals["middling"] <= 8


def test_the_page_states_the_rubric_and_sums_that_add_up(page: str) -> None:
    assert page.replace("\n", " ").isprintable()  # an escape in a quoted text would not be
    rows = re.findall(r"^\| \*\*(\w+)\*\* \|(.*)\|$", page, re.MULTILINE)
    assert tuple(line for line, _ in rows) == projects.LINES
    assert all(len(levels.split("|")) == projects.MOST + 1 for _, levels in rows)
    graded = GRADED.findall(page)
    assert len(graded) == len(projects.SAMPLES) * len(STEMS)
    for total, most, reasons in graded:
        given = [re.search(rf"\b{line} (\d), ", reasons) for line in projects.LINES]
        assert sum(int(found[1]) for found in given if found) == int(total) and all(given)
        assert int(most) == projects.MOST * len(projects.LINES)


@pytest.mark.parametrize("stem", STEMS)
def test_numbers_come_from_records_and_each_is_used(stem: str) -> None:
    project = PROJECTS[stem]
    texts = [project["good"]["answer"], project["middling"]["answer"], project["measured"]]
    typed = re.compile(r"\d[.,]\d{2,}|\d ?%|\d nats")
    assert not any(typed.search(text) for text in texts)
    names = set(re.findall(r"\{(\w+)\}", " ".join(texts)))
    assert names == set(project_numbers.NUMBERS[project["number"]]())


def test_what_the_answers_say_of_the_records_holds() -> None:
    """Sentences that lean on a sign or an order, which a new record could change."""
    of = {number: numbers() for number, numbers in project_numbers.NUMBERS.items()}
    zero = of["0.1"]
    assert zero["zero"].verdict == "higher" and float(zero["half"]) < fmean(
        zero["zero"].differences
    )
    assert float(zero["rate"]) < float(zero["usual_rate"])
    error = {kind: float(of["1.1"][f"error_{kind}"].rstrip("%")) for kind in ("nf4", "int4", "fp4")}
    assert error["nf4"] < error["int4"] < error["fp4"]
    assert (
        of["1.1"]["mean"].verdict == "within noise"
        and 0 < float(of["1.1"]["gone"].rstrip("%")) < 10
    )
    assert of["1.1"]["lower"] == 1 and of["1.1"]["higher"] == 0
    charged = of["1.2"]
    assert charged["charged"].verdict == charged["charged_lora"].verdict == "within noise"
    assert charged["lot"].verdict == "higher"
    assert charged["used"] < charged["parameters"] < charged["least"] < charged["most"]
    assert charged["narrow_adalora"] < charged["narrow"]
    fifth = of["2.1"]
    assert {fifth[key].verdict for key in ("others", "token", "ceiling")} == {"higher"}
    assert fifth["longer"].verdict == fifth["sequence"].verdict == "within noise"
    assert fifth["three_shakespeare"] > max(fifth["three_bible"], fifth["three_python"])
    assert of["2.1"]["gate_shakespeare"] > of["2.1"]["gate_milton"]
    stages = of["2.2"]
    assert stages["restarts"].verdict == stages["full"].verdict == "within noise"
    for key in ("stack", "full_large", "unequal", "first", "last"):
        assert stages[key].verdict == "higher"
    assert fmean(stages["first"].differences) > 5 * fmean(stages["last"].differences)
    crowd = of["3.1"]
    assert crowd["random"].verdict == "lower"
    for key in ("anew", "capped", "level", "capped_chance"):
        assert crowd[key].verdict == "within noise"
    assert all(apart < 0 for apart in crowd["capped"].differences)
    assert crowd["size_anew"] < crowd["size_capped"]
    alone = of["3.2"]
    assert {alone[key].verdict for key in ("taught", "new", "text")} == {"within noise"}
    assert alone["alone"].verdict == "higher" and alone["merged"].verdict == "lower"
    assert (
        alone["quarter"].verdict == "within noise" and alone["three_quarters"].verdict == "higher"
    )
    assert abs(fmean(alone["new"].differences)) < alone["new"].half
    assert float(alone["check"]) < 0.005  # the tolerance of a training's repetition
    assert not any(study.load_study("3_2_project")["runs"]["rows"]["both"].values())
    merged = of["3.3"]
    assert merged["ties"].verdict == merged["summed"].verdict == "higher"
    assert merged["tuned"].verdict == "within noise" and merged["untrimmed"].verdict == "higher"
    assert float(merged["scale_ties"]) < 1 and merged["scale_mean"] == "1"
    gates = of["4.1"]
    assert gates["gates"].verdict == gates["found"].verdict == gates["dealt"].verdict == "lower"
    assert gates["fast"].verdict == gates["places"].verdict == "within noise"
    assert gates["anew"].verdict == "higher" and gates["few"] < gates["all"] / 2 < gates["many"]
    assert gates["lora_size"] < gates["dealt_size"]
    block = of["4.2"]
    assert block["own_8"].verdict == "higher" and block["own_1"].verdict == "within noise"
    assert {block[key].verdict for key in ("last_1", "last_8", "scaled_8")} == {"higher"}
    assert block["scales_8"].verdict == "within noise" and block["rate"] == block["rate_scaled"]
    few = of["4.3"]
    assert few["bits_3"].verdict == few["bits_2"].verdict == "higher"
    assert 5 * fmean(few["bits_3"].differences) < fmean(
        few["bits_2"].differences
    )  # "almost nothing"
    assert few["middle"] == few["bytes_3"]
    assert few["mixed"].verdict == "lower" and few["rotating"].verdict == "higher"
    assert few["plain"].verdict == "within noise"
    assert few["error_3"] < few["error_mixed_rotated"] < few["error_3_rotated"] < few["error_mixed"]
    more = of["4.4"]
    assert more["apart"] == 0 and more["peak_again"] < more["peak_whole"]
    assert float(more["time_whole"]) < 1.05 < float(more["time_again"])


def test_a_pair_is_the_first_less_the_second() -> None:
    lower = project_numbers.Pair([1.0, 1.1, 1.2], [2.0, 2.2, 2.1])
    assert lower.verdict == "lower" and str(lower).startswith(
        "-1.000 bits a byte (95% interval -1."
    )
    assert lower.half == pytest.approx(0.2484, abs=1e-3)  # t(0.975, 2) = 4.303, s = 0.1, n = 3


def test_the_guide_leads_to_the_page() -> None:
    assert "](projects.md)" in Path(ROOT / "book" / "instructors.md").read_text()
