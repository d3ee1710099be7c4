"""Every exercise's check on wrong answers, right answers, mutants of the solution, and the chapter's own cells."""

import ast
import functools
import importlib
import math
import pickle
import signal
import time
from pathlib import Path
from types import FunctionType
from typing import Any

import jupytext
import pytest

from lora_course.classroom.calls import Answer
from lora_course.classroom.exercises import Draw, Result
from tests.exercises import ANSWERS, Answers
from tests.exercises.mutants import mutants
from tools.chapters import ROOT

SEEDS = (0, 1)
MUTANT_SECONDS, TIMES_THE_SOLUTION = 1, 10  # of computing: some mutants never end

for path in sorted(Path(__file__).with_name("exercises").glob("chapter_*.py")):
    importlib.import_module(f"tests.exercises.{path.stem}")

every_exercise = pytest.mark.parametrize("id", ANSWERS)


def judged(answers: Answers, answer: Any, seed: int = 0) -> Result:
    return answers.check.exercise.judge(answer, seed)


@functools.cache
def chapter_cells(number: str) -> list[Any]:
    """All cells of a chapter, "2.1"; read once for all of its exercises."""
    (chapter,) = ROOT.glob(f"notebooks/{number.replace('.', '_')}_*.md")
    return jupytext.read(chapter).cells


def cells(id: str, kind: str) -> list[str]:
    """The code of the chapter's cells of an exercise, tagged `exercise` or `solution`."""
    return [
        cell.source
        for cell in chapter_cells(id.split("-")[0])
        if kind in cell.metadata.get("tags", []) and cell.metadata.get("exercise_id") == id
    ]


def imports(id: str, source: str) -> dict[str, Any]:
    """What the chapter imports, as far as `source` uses it: all that a solution may rest on."""
    used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    namespace: dict[str, Any] = {}
    for cell in chapter_cells(id.split("-")[0]):
        if cell.cell_type != "code" or cell.source.lstrip().startswith("%"):
            continue
        try:
            statements = ast.parse(cell.source).body
        except SyntaxError:  # a cell with a magic
            continue
        for node in statements:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {(alias.asname or alias.name).split(".")[0] for alias in node.names}
                if names & used:
                    exec(ast.unparse(node), namespace)
    return namespace


def solution(id: str) -> tuple[str, str, dict[str, Any]]:
    """Source of the solution's cell, the name of its function, and what it may use."""
    (source,) = cells(id, "solution")
    functions = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return source, functions[-1], imports(id, source)


def defined(source: str, name: str, namespace: dict[str, Any]) -> FunctionType:
    namespace = dict(namespace)
    exec(compile(source, "<solution>", "exec"), namespace)
    return namespace[name]


@every_exercise
def test_no_wrong_answer_passes_and_each_gets_a_sentence(id: str) -> None:
    answers = ANSWERS[id]
    named = [(f"named: {text}", wrong) for text, wrong in answers.check.exercise.mistakes.items()]
    assert len(answers.wrongs) >= 15, f"{id} has {len(answers.wrongs)} wrong answers"
    passed = []
    for label, answer in answers.wrongs + named:
        for seed in SEEDS[: 1 if label.startswith("named") else None]:
            result = judged(answers, answer, seed)
            if result.status == "right":
                passed.append((label, seed))
            elif result.status == "wrong":
                message = result.message
                assert "\n" not in message and len(message) < 400, (label, message)
                assert "Traceback" not in message and message[-1] in ".?:)", (label, message)
    assert not passed


@every_exercise
def test_no_right_answer_is_refused(id: str) -> None:
    answers = ANSWERS[id]
    assert len(answers.rights) >= 6, f"{id} has {len(answers.rights)} right answers"
    refused = [
        (label, seed, result.message)
        for label, answer in [*answers.rights, ("the reference", answers.check.exercise.right)]
        for seed in (*SEEDS, 2)
        if (result := judged(answers, answer, seed)).status != "right"
    ]
    assert not refused


@every_exercise
def test_a_named_mistake_is_called_by_its_name(id: str) -> None:
    answers = ANSWERS[id]
    called = {
        text: judged(answers, wrong).message
        for text, wrong in answers.check.exercise.mistakes.items()
    }
    # what stops it before values are compared has a sentence of its own
    misnamed = {
        text: found
        for text, found in called.items()
        if found != text and found in answers.check.exercise.mistakes
    }
    assert not misnamed


@every_exercise
def test_no_mutant_of_the_solution_passes_unless_it_is_right_too(id: str) -> None:
    answers = ANSWERS[id]
    source, name, namespace = solution(id)
    start = time.process_time()
    assert _passes(answers, source, name, namespace, math.inf)
    most = max(MUTANT_SECONDS, TIMES_THE_SOLUTION * (time.process_time() - start))
    survived = {}
    for label, mutant in mutants(source):
        if label not in answers.equivalents and _passes(answers, mutant, name, namespace, most):
            survived[label] = mutant
    assert not survived, "\n".join(survived)


@every_exercise
def test_the_chapters_solution_is_right_and_leaves_the_learners_answer_alone(id: str) -> None:
    answers = ANSWERS[id]
    source, name, namespace = solution(id)
    assert name.startswith("solution_"), f"{id}: the solution overwrites {name}"
    assert answers.check.__name__ not in source, f"{id}: the solution prints the learner's verdict"
    result = judged(answers, defined(source, name, namespace))
    assert result.status == "right", result.message


@every_exercise
def test_the_chapters_stub_is_not_answered_yet(id: str, capsys: pytest.CaptureFixture) -> None:
    (source,) = cells(id, "exercise")
    exec(source, {ANSWERS[id].check.__name__: ANSWERS[id].check} | imports(id, source))
    assert capsys.readouterr().out.startswith(f"– {id}: not answered yet")
    for stub in (None, ..., lambda *arguments, **keywords: ...):
        assert (
            judged(ANSWERS[id], stub).status == "not attempted"
            or ANSWERS[id].check.exercise.changes
        )


@every_exercise
def test_what_goes_to_the_learner_and_back_can_be_sent_to_another_process(id: str) -> None:
    exercise = ANSWERS[id].check.exercise
    for this in exercise.cases(Draw(0)):
        sent = pickle.loads(pickle.dumps(exercise.arguments(this)))
        pickle.dumps(Answer(exercise.right).call(sent, exercise.draws))


def _passes(
    answers: Answers, mutant: str, name: str, namespace: dict[str, Any], seconds: float
) -> bool:
    """Within so many seconds of computing."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds if seconds < math.inf else 0)
    try:
        function = defined(mutant, name, namespace)
        return all(judged(answers, function, seed).status == "right" for seed in SEEDS)
    except Exception:  # it can't even be defined
        return False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
