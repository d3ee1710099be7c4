"""`tests.order`: each worker's piece starts with long tests, and nothing is lost."""

import pytest

from tests.order import deal

MODULES = {"a": 9, "b": 4, "c": 1, "d": 12, "e": 3, "f": 5, "g": 7}
SLOW = {("b", 1), ("b", 3), ("c", 0), ("e", 0), ("e", 1), ("e", 2), ("g", 6)}
TESTS = [(module, i) for module, count in MODULES.items() for i in range(count)]


def dealt(hands: int) -> list[tuple[str, int]]:
    return deal(TESTS, hands, lambda test: test[0], SLOW.__contains__)


@pytest.mark.parametrize("hands", [1, 2, 3, 4, 9])
def test_each_test_comes_once_and_a_module_with_long_ones_in_one_piece(hands: int) -> None:
    order = dealt(hands)
    assert sorted(order) == TESTS
    for module in "bceg":
        places = [order.index((module, i)) for i in range(MODULES[module])]
        assert places == list(range(places[0], places[0] + MODULES[module]))


def test_each_of_two_pieces_starts_with_its_share_of_long_tests_and_ends_with_quick_ones() -> None:
    order = dealt(2)
    pieces = order[: len(order) // 2], order[len(order) // 2 :]
    # of 3, 2, 1 and 1 long tests one worker gets 3 and 1, the other 2 and 1
    assert [list(dict.fromkeys(module for module, _ in piece)) for piece in pieces] == [
        ["e", "g", "a", "d"], ["b", "c", "d", "f"]
    ]  # fmt: skip
    for piece in pieces:
        last = max(i for i, test in enumerate(piece) if test in SLOW)
        assert last < len(piece) - 8


def test_without_long_tests_the_order_stays() -> None:
    assert deal(TESTS, 2, lambda test: test[0], lambda test: False) == TESTS
