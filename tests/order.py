"""The order of tests for several workers that steal from each other (pytest-xdist's worksteal)."""

from collections.abc import Callable, Hashable
from typing import TypeVar

Item = TypeVar("Item")


def deal(
    items: list[Item], hands: int, module: Callable[[Item], Hashable], slow: Callable[[Item], bool]
) -> list[Item]:
    """The items in another order, in which each of `hands` workers starts with long tests and ends with quick ones.

    A worker is given as many of the items as any other, in one piece, and later takes from the end of another's piece: short
    tests there let all end together. A module with long tests stays whole, since its fixtures are as long.
    """
    modules: dict[Hashable, list[Item]] = {}
    for item in items:
        modules.setdefault(module(item), []).append(item)
    weights = {name: sum(map(slow, tests)) for name, tests in modules.items()}
    dealt: list[list[Item]] = [[] for _ in range(hands)]
    loads = [0] * hands
    for name in sorted(filter(weights.get, weights), key=weights.__getitem__, reverse=True):
        hand = loads.index(min(loads))
        dealt[hand] += modules[name]
        loads[hand] += weights[name]
    quick = [item for name, tests in modules.items() if not weights[name] for item in tests]
    for hand, left in zip(dealt, range(hands, 0, -1)):
        rest = len(quick) + sum(map(len, dealt[hands - left :]))
        count = max(0, rest // left - len(hand))
        hand += quick[:count]
        del quick[:count]
    return [item for hand in dealt for item in hand]
