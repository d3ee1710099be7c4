"""What must hold for every family of graded problems, over fifty seeds."""

import ast
import collections
import itertools

import pytest
import torch

from lora_course import distillation, hierarchical, nf4, quantized, sparse
from lora_course.classroom.assign import CHAPTERS
from lora_course.classroom.comparison import difference
from lora_course.classroom.draws import Draw
from lora_course.classroom.families import Family, families, find, of_chapter
from lora_course.classroom.judge import gradients_of
from lora_course.classroom.plain import plain
from lora_course.classroom.remote import put_back
from lora_course.classroom.snapshots import changed, snapshot
from lora_course.classroom.wire import decode, encode
from lora_course.lab import evidence

SEEDS = [f"class {number}" for number in range(50)]
each_family = pytest.mark.parametrize("family", families().values(), ids=list(families()))


def outcome(family: Family, function, case: tuple) -> list:
    """What a check compares, without its guards, which take most of its time."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    given = {
        name: value.clone() if isinstance(value, torch.Tensor) else list(value) if isinstance(value, list) else value
        for name, value in zip(names, case, strict=True)
    }  # fmt: skip
    for name in family.gradients:
        given[name].requires_grad_()
    result = function(**given)
    if family.changes:
        return [given[name] for name in family.changes]
    if not family.gradients:
        return [result]
    return [
        result,
        *gradients_of(result, {name: given[name] for name in family.gradients}).values(),
    ]


def differs(family: Family, function, cases: list[tuple], right: list[list]) -> bool:
    for case, expected in zip(cases, right, strict=True):
        try:
            if difference(outcome(family, function, case), expected, family.tolerance):
                return True
        except Exception:
            return True
    return False


def test_each_chapter_has_two_families_and_some_are_bugs_to_find() -> None:
    counts = collections.Counter(family.chapter for family in families().values())
    assert set(counts) == set(CHAPTERS) and min(counts.values()) >= 2
    assert sum(family.kind == "find the bug" for family in families().values()) >= 8
    with pytest.raises(ValueError, match=r"9\.9.*there are 0\.1, 1\.1"):
        of_chapter("9.9")
    with pytest.raises(ValueError, match="no family"):
        find("1.1-nothing")


@each_family
def test_the_text_says_every_rule_that_is_drawn(family: Family) -> None:
    for seed in SEEDS:
        choice = family.draw(seed)
        text, source = family.state(choice), family.solution(choice)
        for name in family.conventions:
            assert " ".join(family.sentence(choice, name).split()) in text
        assert not any(f"{{{name}}}" in text or f"${name}" in source for name in family.conventions)
    for name, table in family.conventions.items():
        assert f"{{{name}}}" in family.statement and f"${name}" in family.answer
        sentences = [sentence for sentence, _ in table.values()]
        assert len(set(sentences)) == len(sentences) and all(sentences)


@each_family
def test_another_rule_is_another_answer(family: Family) -> None:
    """On each seed's inputs: every other choice of one rule, the chapter's answer, and other classes' answers fail."""
    other_classes = [family.draw(seed) for seed in SEEDS]
    book = {name: family.of_book(name)[0] for name in family.conventions}
    known = all(book[name] in family.conventions[name] for name in book)
    passed = []
    for number, seed in enumerate(SEEDS):
        choice = family.draw(seed)
        cases = family.cases(Draw(number), choice)
        right = [outcome(family, family.function(choice), case) for case in cases]
        others = itertools.chain(*family.neighbours(choice).values(), [book] * known, other_classes)
        for other in {tuple(other.items()): other for other in others}.values():
            if other != choice and not differs(family, family.function(other), cases, right):
                changed = {n: (choice[n], other[n]) for n in choice if choice[n] != other[n]}
                passed.append((seed, changed, choice))
    assert passed == []


@each_family
def test_its_own_solution_passes_and_the_stub_does_not(family: Family) -> None:
    for number, seed in enumerate(SEEDS[:8]):
        choice = family.draw(seed)
        check = family.exercise(choice)
        result = check.judge(family.function(choice), number)
        assert result.status == "right" and result.points == family.points, (choice, result)
        stub = check.judge(family.build(family.stub(choice, seed)), number)
        assert stub.status == ("wrong" if family.bugs else "not attempted"), (choice, result)


@each_family
def test_a_missed_rule_is_named(family: Family) -> None:
    choice = family.draw("a class")
    check = family.exercise(choice)
    for name, others in family.neighbours(choice).items():
        result = check.judge(family.function(others[0]), 5)
        assert result.status == "wrong"
        if "one rule" in result.message:
            assert plain(family.sentence(choice, name)) in result.message
        for line in family.solution(choice).splitlines():
            assert len(line.strip()) < 12 or line.strip() not in result.message


def test_16_bits_hide_no_rule() -> None:
    """To take no weight decay moves an answer by less than the steps of bf16."""
    family = find("0.1-step")
    choice = next(choice for choice in family.variants() if choice["decay"] == "decoupled")
    step = family.function(choice | {"decay": "none"})
    exact = family.function(choice)
    check = family.exercise(choice)

    def rounded(function, to):
        return lambda *arguments: tuple(to(result) for result in function(*arguments))

    for to in (torch.Tensor.bfloat16, torch.Tensor.half, lambda t: t.numpy().astype("float16")):
        assert "32 bits" in check.judge(rounded(step, to), 0).message
    assert check.judge(rounded(exact, torch.Tensor.double), 0).status == "right"


@each_family
def test_each_planted_mistake_alone_is_wrong(family: Family) -> None:
    for number, seed in enumerate(SEEDS[:12]):
        choice = family.draw(seed)
        cases = family.cases(Draw(number), choice)
        right = [outcome(family, family.function(choice), case) for case in cases]
        for bug in family.bugs:
            broken = family.build(family.plant(family.solution(choice), [bug]))
            assert differs(family, broken, cases, right), (bug, choice)
    if family.bugs:
        for seed in SEEDS:
            assert len(family.planted(seed)) == 2
            family.build(family.stub(family.draw(seed), seed))  # two mistakes never share a place
        assert len({tuple(family.planted(seed)) for seed in SEEDS}) >= 3


@pytest.mark.parametrize("id", [f.id for f in families().values() if f.gradients])
def test_where_a_gradient_is_asked_for_no_rules_make_it_vanish(id: str) -> None:
    """With one expert chosen and gates that sum to one, each gate was 1: the loss had no slope, and a mistake no effect."""
    family = families()[id]
    for choice in family.variants():
        cases = family.cases(Draw(1), choice)
        slopes = [outcome(family, family.function(choice), case)[1] for case in cases]
        assert max(slope.abs().max() for slope in slopes) > 1e-4, choice


@each_family
def test_difficulty_stays(family: Family) -> None:
    """Drawn solutions are about equally long, and no rule is ever left out."""
    drawn = [family.draw(seed) for seed in SEEDS]
    assert len({tuple(choice.items()) for choice in drawn}) >= 6
    assert all(family.distance(choice) >= 2 for choice in drawn)
    nodes = [sum(1 for _ in ast.walk(ast.parse(family.solution(choice)))) for choice in drawn]
    assert max(nodes) <= 1.7 * min(nodes)
    assert 10 <= family.minutes <= 30 and 3 <= family.points <= 5


def _merged(weight, A, B, lora_alpha):
    return weight + lora_alpha / A.shape[0] * B @ A


def _stored(rows, columns, bits, block):
    return round(nf4.storage_bits(rows * columns, block) * rows * columns)


def _read_back(weight, codebook, block):
    return nf4.dequantize_nf4(nf4.quantize_nf4(weight, block, double_quant=False))


def _kd(divergence):
    def loss(student, teacher, labels, alpha, T):
        config = distillation.DistillationConfig(alpha, T, divergence=divergence)
        return distillation.distillation_loss(student, [teacher], labels, config).loss

    return loss


def _mix(logits, weights, T):
    config = distillation.DistillationConfig(temperature=T)
    return distillation.mixture_log_probs(list(logits), weights, config)


def _grid(granularity, clip):
    return lambda x, bits: quantized.fake_quantize(x, bits, granularity, clip=clip)


def _weights(ranks, r):
    return [*hierarchical.matryoshka_weights(ranks).tolist(), *[0.0] * (r - max(ranks))]


def _close(gates, gradient, lr, penalty):
    return sparse.soft_threshold(gates - lr * gradient, lr * penalty)


PACKAGE = {
    "0.1-merge": [_merged],
    "1.1-storage": [_stored],
    "1.1-quantizer": [_read_back],
    "3.2-loss": [_kd("forward"), _kd("reverse")],
    "3.2-mixture": [_mix],
    "4.1-threshold": [_close],
    "4.2-weights": [_weights],
    "4.3-grid": [_grid(g, c) for g in ("tensor", "channel", "group") for c in (1.0, 0.75)],
    "5.1-front": [lambda points, margin: evidence.pareto(points)],
}


@pytest.mark.parametrize("id", PACKAGE)
def test_what_the_package_computes_is_no_answer(id: str) -> None:
    """Under none of fifty seeds; and where the package makes the chapter's choices, it is the answer to those."""
    family = find(id)
    book = {name: family.of_book(name)[0] for name in family.conventions}
    for number, seed in enumerate(SEEDS):
        choice = family.draw(seed)
        cases = family.cases(Draw(number), choice)
        right = [outcome(family, family.function(choice), case) for case in cases]
        for function in PACKAGE[id]:
            assert differs(family, function, cases, right), (seed, choice)
    if id in ("0.1-merge", "3.2-loss", "4.1-threshold", "4.2-weights"):
        cases = family.cases(Draw(1), book)
        right = [outcome(family, family.function(book), case) for case in cases]
        assert not differs(family, PACKAGE[id][0], cases, right)


@each_family
def test_arguments_that_nobody_changed_come_back_from_a_sandbox_unchanged(family: Family) -> None:
    check = family.exercise(family.draw(SEEDS[0]), explain=False)
    for this in check.cases(Draw(0)):
        arguments = check.arguments(this)
        before = snapshot(arguments, "given")
        for name, value in decode(encode(arguments)).items():
            put_back(arguments[name], value)
        assert not changed(before, snapshot(arguments, "given"))


@each_family
def test_a_message_names_the_missed_rule_without_tex(family: Family) -> None:
    for choice in family.variants()[:20]:
        messages = family.exercise(choice).mistakes
        assert len(messages) >= len(family.conventions)
        assert not any(sign in text for text in messages for sign in ("$", "\\"))
