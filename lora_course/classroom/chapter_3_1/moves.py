"""Exercise 3.1-c: ranks that move."""

import numbers

from lora_course.classroom.exercises import Draw, case, exercise, mistake


def move_ranks(scores, ranks, count, step, min_r, max_r, *, order=None, give=None, take=None):
    """The moves, with each part of the rule exchangeable for a mistake."""
    names = sorted(scores, key=lambda name: -scores[name]) if order is None else order(scores)
    moves = {}
    for taker, giver in zip(names[:count], names[::-1][:count], strict=True):
        room = max_r - ranks[taker] if take is None else take(max_r - ranks[taker], step)
        spare = ranks[giver] - min_r if give is None else give(ranks[giver], step)
        if ranks_moved := min(step, room, spare):
            moves[taker], moves[giver] = ranks_moved, -ranks_moved
    return moves


def _moves(**other):
    return lambda *given: move_ranks(*given, **other)


def _by_itself(scores, ranks, count, step, min_r, max_r):
    """Takers take what they can, givers give what they can, and nobody compares."""
    names = sorted(scores, key=lambda name: -scores[name])
    moves = {name: min(step, max_r - ranks[name]) for name in names[:count]}
    moves |= {name: -min(step, ranks[name] - min_r) for name in names[::-1][:count]}
    return {name: move for name, move in moves.items() if move}


MOVE_MISTAKES = {
    "Ranks move the wrong way: the layer of the higher score gains.":
        lambda *given: {name: -move for name, move in move_ranks(*given).items()},
    "The lowest scores gain: sort from the highest.": _moves(order=lambda scores: sorted(scores, key=scores.get)),
    "A layer gives more than it may: it keeps `min_r`.": _moves(give=lambda rank, step: step),
    "A layer gives all that it has: it keeps `min_r`.": _moves(give=lambda rank, step: rank),
    "A layer gets above `max_r`.": _moves(take=lambda room, step: step),
    "In a pair one gains what it has room for and the other gives what it can spare: the two numbers must be equal, the smaller one.":
        _by_itself,
    "You return the new ranks; what each layer gains or loses is asked for.": lambda scores, ranks, *rest: {
        name: ranks[name] + move for name, move in move_ranks(scores, ranks, *rest).items()},
    "Among equal scores the layer that is listed first counts as the higher one.":
        _moves(order=lambda scores: sorted(reversed(scores), key=lambda name: -scores[name])),
    "`count` is not used: only one pair of layers exchanges ranks.":
        lambda scores, ranks, count, *rest: move_ranks(scores, ranks, min(count, 1), *rest),
    "`count` is not used: all layers exchange ranks.":
        lambda scores, ranks, count, *rest: move_ranks(scores, ranks, len(scores) // 2, *rest),
    "The second highest score goes with the lowest but `count`: pair the highest with the lowest, and so inwards.":
        lambda scores, ranks, count, *rest: move_ranks(scores, ranks, count, *rest, order=lambda scores: (
            lambda names: names[:-count] + names[-count:][::-1] if count else names)(
                sorted(scores, key=lambda name: -scores[name]))),
    "One rank moves at a time; up to `step` may.":
        lambda scores, ranks, count, step, *rest: move_ranks(scores, ranks, count, 1, *rest),
}  # fmt: skip


def _use_moves(found, scores, **_):
    """The change of every layer, those that stay included."""
    mistake(
        not isinstance(found, dict) or bool(set(found) - set(scores)),
        "A dictionary by layer is expected, with names out of `scores`.",
    )
    stays = [value for value in found.values() if isinstance(value, numbers.Number) and value == 0]
    mistake(
        bool(stays), "Layers that gain nothing and lose nothing are listed too: leave them out."
    )
    return dict.fromkeys(scores, 0) | found


@exercise(
    "3.1-c",
    points=2,
    right=move_ranks,
    look=_use_moves,
    mistakes=MOVE_MISTAKES,
    whole=True,
    otherwise="Some layer gains or loses another number of ranks.",
)
def check_move_ranks(draw: Draw):
    """Ranks move from layers of low score to layers of high score."""
    for number, count, kind, hint in [
        (5, 1, "roomy", ""),
        (6, 3, "roomy", "With three pairs it goes wrong."),
        (7, 3, "tight", "Near `min_r` and `max_r` it goes wrong."),
        (7, 2, "tight", "Near `min_r` and `max_r` it goes wrong."),
        (6, 3, "ties", "Where scores are equal it goes wrong: the layer listed first counts as the higher one."),
        (6, 1, "ties", "Where scores are equal it goes wrong: the layer listed first counts as the higher one."),
        (4, 2, "full", "Where nobody has room, or nobody can spare a rank, it goes wrong."),
        (4, 0, "roomy", "With no pairs at all it goes wrong: nothing changes."),
        (9, 4, "tight", "Near `min_r` and `max_r` it goes wrong."),
        (8, 3, "stuck", "Where a pair can't move a rank it goes wrong: nobody steps in for it."),
        (6, 2, "negative", "With negative scores it goes wrong: −1 is lower than 0."),
    ]:  # fmt: skip
        names = [f"layers.{i}.{draw.choice(['q_proj', 'up_proj'])}" for i in range(number)]
        draw.random.shuffle(names)  # listed in no order of names, and two of them against it
        names[0], names[1] = max(names[:2]), min(names[:2])
        scores = dict(zip(names, [draw.number(0, 1) for _ in names], strict=True))
        step, min_r = draw.integer(2, 4), draw.integer(1, 3)
        max_r = min_r + 3 * step
        ranks = {name: draw.integer(min_r + step, max_r - step) for name in names}
        if kind == "tight":
            ranks = {name: draw.integer(min_r, max_r) for name in names}
            ordered = sorted(names, key=lambda name: -scores[name])
            for place, rank in [
                (0, max_r - 1),
                (-1, max_r),
                (1, min_r),
                (-2, max_r),
                (2, min_r),
                (-3, min_r + 1),
            ]:
                ranks[ordered[place]] = rank
        elif kind == "stuck":
            ordered = sorted(names, key=lambda name: -scores[name])
            ranks[ordered[0]], ranks[ordered[-2]] = max_r, min_r
        elif kind == "negative":
            scores = {name: score - 1.2 * (i % 2) for i, (name, score) in enumerate(scores.items())}
        elif kind == "ties":
            levels = [1.0] * number if count > 1 else [1.0, 2.0, 1.0, 2.0, 1.0, 1.0]
            scores = dict(zip(names, levels, strict=True))
        elif kind == "full":
            ranks = dict.fromkeys(names, draw.choice([min_r, max_r]))
        yield case(scores, ranks, count, step, min_r, max_r, hint=hint)
