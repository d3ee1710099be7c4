"""One search for the learning rate, and the runs "arm/rate/seed/split" that it reads and decides."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lora_course.experiments.study import Runs

EXTENSIONS = 8  # doublings or halvings of a rate beyond the first ones, before a search gives up
Value = Callable[[Mapping[str, Any]], float]


def run_key(arm: str, rate: float, seed: int, split: str) -> str:
    return f"{arm}/{rate:g}/{seed}/{split}"


def bits_per_byte(run: Mapping[str, Any]) -> float:
    return run["bits_per_byte"]


class Kept:
    """`train(*arguments, rate, seed)` as a function of (rate, seed) that remembers: what is chosen is not trained again for
    the other split."""

    def __init__(self, train: Callable[..., Any], *arguments: Any) -> None:
        self.train = functools.partial(train, *arguments)
        self.made: dict[tuple[float, int], Any] = {}

    def __call__(self, rate: float, seed: int) -> Any:
        if (rate, seed) not in self.made:
            self.made[rate, seed] = self.train(rate, seed)
        return self.made[rate, seed]

    def only(self, rates: Sequence[float]) -> None:
        """Forgets the trainings at other rates: a large model is not held once for each rate."""
        self.made = {key: value for key, value in self.made.items() if key[0] in rates}


def search(
    value: Callable[[float, int], float],
    first: Sequence[float],
    seeds: Sequence[int],
    agree: int | None = None,
    edges: bool = True,
) -> float:
    """The learning rate with the lowest mean of `value` (rate, seed), NaN being the worst.

    All of `first` are tried, neighbours that differ by factors of two; while the best lies at an edge of what was tried, the
    next rate on that side is tried too.

    Args:
        agree: ask so many of the seeds; while fewer than that find the mean's best rate best by themselves, ask the next
            seed too. By default all seeds are asked.
        edges: go on beyond an edge; False for a choice that another study goes on with.

    Raises:
        ValueError: the best is still at the edge after eight more rates.
    """
    rates, count = list(first), agree or len(seeds)

    def lost(rate: float, seed: int) -> float:
        found = value(rate, seed)
        return math.inf if math.isnan(found) else found

    def best_of(seed: int) -> float:
        return min(rates, key=lambda rate: lost(rate, seed))

    while True:
        means = {rate: statistics.fmean(lost(rate, s) for s in seeds[:count]) for rate in rates}
        best = min(means, key=means.__getitem__)
        if edges and best in (min(rates), max(rates)):
            if len(rates) == len(first) + EXTENSIONS:
                raise ValueError(
                    f"the best rate, {best:g}, still lies at the edge of {min(rates):g} to {max(rates):g}: begin the search "
                    "elsewhere, or look at the losses"
                )
            rates.append(best * 2 if best == max(rates) else best / 2)
            continue
        own = sum(best_of(seed) == best for seed in seeds[:count])
        if own >= (agree or 0) or count == len(seeds):
            return best
        count += 1


def choose(
    runs: Runs,
    arm: str,
    compute: Callable[[float, int, str], Mapping[str, Any]],
    first: Sequence[float],
    seeds: Sequence[int],
    value: Value = bits_per_byte,
    edges: bool = True,
) -> float:
    """The rate, or another number, that `search` finds on an arm's runs on validation text.

    compute: (rate, seed, split) → the values of a run.    value: as in `compete`.
    """

    def validate(rate: float, seed: int) -> float:
        key = run_key(arm, rate, seed, "validation")
        return value(runs(key, compute, rate, seed, "validation"))

    return search(validate, first, seeds, edges=edges)


def compete(
    runs: Runs,
    arm: str,
    trained: Kept,
    score: Callable[[Any, str], Mapping[str, Any]],
    first: Sequence[float],
    search_seeds: Sequence[int],
    *,
    agree: int | None = None,
    value: Value = bits_per_byte,
    seeds: Sequence[int] | None = None,
    splits: Sequence[str] = ("test",),
) -> float:
    """One arm from its search to its tests: `search` on the validation split, then `seeds`, by default those of `runs`, at the
    chosen rate on the test split, or on other `splits`.

    trained: (rate, seed) → what `score` takes.    score: (trained, split) → the values of a run.
    value: of a run's values the number that is to be low; `lambda found: -found["accuracy"]` for one that is to be high.
    Keys are "arm/rate/seed/split". Returns the chosen rate.
    """
    values: dict[float, dict[int, float]] = {}

    def scored(rate: float, seed: int, split: str) -> Mapping[str, Any]:
        return score(trained(rate, seed), split)

    def validate(rate: float, seed: int) -> float:
        run = runs(run_key(arm, rate, seed, "validation"), scored, rate, seed, "validation")
        values.setdefault(rate, {})[seed] = value(run)
        means = {r: statistics.fmean(found.values()) for r, found in values.items()}
        trained.only([rate, min(means, key=means.__getitem__)])
        return values[rate][seed]

    best = search(validate, first, search_seeds, agree)
    trained.only([best])
    for split in splits:
        for seed in runs.seeds if seeds is None else seeds:
            runs(run_key(arm, best, seed, split), scored, best, seed, split)
    return best


def first_rates(settings: Mapping[str, Any], arm: str) -> Sequence[float]:
    """Where an arm's search begins: at its own `first_of`, at `first`, or at `learning_rates`, which may be by arm too."""
    known = settings.get("first_of", {}).get(arm) or settings.get("first")
    rates = known or settings["learning_rates"]
    return rates[arm] if isinstance(rates, Mapping) else rates


def compete_all(
    runs: Runs,
    settings: Mapping[str, Any],
    arms: Iterable[str],
    trained: Callable[[str, float, int], Any],
    score: Callable[[Any, str], Mapping[str, Any]],
    *,
    value: Value = bits_per_byte,
    splits: Sequence[str] = ("test",),
) -> dict[str, float]:
    """`compete` for each arm, as the settings say where its search begins and with which seeds. Returns the rates by arm.

    trained: (arm, rate, seed) → what `score` takes.    The rest is as in `compete`.
    """
    names, seeds = list(arms), settings["search_seeds"]
    again = len(seeds) if "validation" in splits else 0  # the search has scored the best there
    for arm in names:
        tried = len(first_rates(settings, arm)) * len(seeds)
        runs.expect(tried + len(splits) * len(runs.seeds) - again)
    return {
        arm: compete(
            runs, arm, Kept(trained, arm), score, first_rates(settings, arm), seeds, value=value,
            splits=splits,
        )
        for arm in names
    }  # fmt: skip


def at_rate(
    runs: Runs,
    arm: str,
    rate: float,
    compute: Callable[[float, int], Mapping[str, Any]],
    split: str = "test",
) -> None:
    """An arm that searches no rate of its own: every seed at this one. compute: (rate, seed) → the values of a run."""
    for seed in runs.seeds:
        runs(run_key(arm, rate, seed, split), compute, rate, seed)
