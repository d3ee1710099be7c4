"""Exercise 4.4-c: a flat batch of tokens, each request with an adapter of its own."""

from typing import Any

import torch

from lora_course.classroom.exercises import Draw, case, exercise


def _update(x, adapter):
    A, B, scaling = adapter
    return scaling * (x @ A.T) @ B.T


def flat_updates(x, lengths, names, adapters, *, update=_update, order=None, none=None):
    """The updates request by request, with each part exchangeable for a mistake."""
    outputs = len(next(iter(adapters.values()))[1])
    parts = x.split(list(lengths))
    names = order(names, adapters) if order else names
    found = []
    for part, name in zip(parts, names, strict=True):
        name = none(adapters) if name is None and none else name
        found.append(
            x.new_zeros(len(part), outputs) if name is None else update(part, adapters[name])
        )
    return torch.cat(found)


def _flat(**other):
    return lambda x, lengths, names, adapters: flat_updates(x, lengths, names, adapters, **other)


def _sorted_by_name(x, lengths, names, adapters):
    """As if rows of one adapter lay together, and were never put back."""
    pairs = sorted(zip(names, lengths, strict=True), key=lambda pair: pair[0] or "")
    return flat_updates(x, [length for _, length in pairs], [name for name, _ in pairs], adapters)


FLAT_MISTAKES = {
    "The adapters' scales are missing: each has one of its own.": _flat(update=lambda x, a: _update(x, (*a[:2], 1.0))),
    "Request i uses the i-th adapter of the dictionary; it is the one called names[i].":
        _flat(order=lambda names, adapters: [list(adapters)[i % len(adapters)] for i in range(len(names))]),
    "All requests use the first request's adapter.":
        _flat(order=lambda names, adapters: [next(n for n in names if n)] * len(names)),
    "A request without an adapter gets one; its update is zero.": _flat(none=lambda adapters: next(iter(adapters))),
    "The requests' rows are sorted by adapter, and not put back in their order.": _sorted_by_name,
    "The requests are taken as equally long.":
        lambda x, lengths, names, adapters: flat_updates(
            x, [len(part) for part in x.tensor_split(len(lengths))], names, adapters),
    "The first token of each request gets its adapter, and the others none.":
        lambda x, lengths, names, adapters: flat_updates(x, lengths, names, adapters) * torch.cat(
            [torch.arange(length) == 0 for length in lengths])[:, None],
    "All adapters are added up; each request has one.":
        lambda x, lengths, names, adapters: sum(_update(x, adapter) for adapter in adapters.values()),
    "All requests get the scale of the first adapter.":
        lambda x, lengths, names, adapters: flat_updates(
            x, lengths, names, {n: (*a[:2], next(iter(adapters.values()))[2]) for n, a in adapters.items()}),
}  # fmt: skip


@exercise(
    "4.4-c",
    points=2,
    right=lambda x, lengths, names, adapters: flat_updates(x, lengths, names, adapters),
    mistakes=FLAT_MISTAKES,
    otherwise="These are not the updates of each token with its own request's adapter.",
)
def check_flat_updates(draw: Draw):
    """Tokens of several requests in one matrix, adapters of different ranks."""
    cases: list[tuple[Any, ...]] = [
        ([4, 2, 5], ["b", "a", "c"], ""),
        ([3, 1, 4, 2], ["c", "a", "c", "b"], "Where two requests share an adapter it goes wrong."),
        ([2, 5, 3], [None, "a", None], "Where a request has no adapter it goes wrong: its rows are 0."),
        ([3, 0, 4], ["a", "b", "c"], "Where a request has no token it goes wrong."),
        ([6], ["b"], "With a single request it goes wrong."),
        ([2, 3], [None, None], "Where no request has an adapter it goes wrong: all is 0."),
    ]  # fmt: skip
    for lengths, names, hint in cases:
        inputs, outputs = draw.sizes(2, 150, 200)
        adapters = {
            # scales of one size: an answer in bf16 is as precise in every row as in all of them
            name: (draw.normal(r, inputs), draw.normal(outputs, r), draw.number(1.2, 3))
            for name, r in zip("abc", draw.sizes(3, 2, 5), strict=True)
        }
        places = range(len(lengths)) if 0 in lengths else draw.order(len(lengths)).tolist()
        lengths, names = [lengths[i] for i in places], [names[i] for i in places]
        largest = inputs * outputs - 1  # anything but a ΔW: factors gathered for each token as well
        yield case(
            draw.normal(sum(lengths), inputs), lengths, names, adapters, hint=hint, largest=largest
        )
