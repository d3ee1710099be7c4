"""Exercise 5.1-d: find the bug in a comparison."""

import math
import statistics

from lora_course.classroom.exercises import Draw, case, exercise

VALIDATION, TEST = 0, 1


def _mean(scores):
    """The mean over seeds; a run that diverged spoils it."""
    return math.inf if any(math.isnan(s) for s in scores) else statistics.fmean(scores)


def _chosen(rates, by=VALIDATION, over=_mean):
    return min(
        sorted(rates), key=lambda rate: over([scores[by] for scores in rates[rate].values()])
    )


def fair_differences(runs, method, reference, *, chosen=_chosen, of=TEST, rate_of=None, pair=None):
    """The paired differences of the test scores, with each part exchangeable for a mistake."""
    found = []
    for arm in (method, reference):
        rate = chosen(runs[rate_of(method, reference) if rate_of else arm])
        found.append({seed: scores[of] for seed, scores in runs[arm][rate].items()})
    first, second = found
    if pair:
        return pair(first, second)
    return [first[seed] - second[seed] for seed in sorted(set(first) & set(second))]


def _fair(**other):
    return lambda runs, method, reference: fair_differences(runs, method, reference, **other)


def _ignoring(scores):
    return statistics.fmean(s for s in scores if not math.isnan(s))


FAIR_MISTAKES = {
    "The rate is chosen on test text: the luckiest run wins. Choose it by the validation scores.":
        _fair(chosen=lambda rates: _chosen(rates, TEST)),
    "The rate is chosen by its best seed; the mean over its seeds decides.":
        _fair(chosen=lambda rates: _chosen(rates, over=lambda s: min(math.inf if math.isnan(x) else x for x in s))),
    "A run that diverged is left out of the mean; a rate at which any run diverged is not chosen.":
        _fair(chosen=lambda rates: _chosen(rates, over=_ignoring)),
    "A NaN decides which rate is chosen: every comparison with it is false.":
        _fair(chosen=lambda rates: min(rates, key=lambda r: sum(s[0] for s in rates[r].values()) / len(rates[r]))),
    "The sums over seeds are compared; a rate with fewer seeds wins so. Compare means.":
        _fair(chosen=lambda rates: _chosen(rates, over=lambda s: _mean(s) * len(s))),
    "Where two rates are equally good the larger is taken; the smaller is asked for.":
        _fair(chosen=lambda rates: min(sorted(rates, reverse=True), key=lambda r: _mean([s[0] for s in rates[r].values()]))),
    "Where two rates are equally good the first in the dictionary is taken; the smaller is asked for.":
        _fair(chosen=lambda rates: min(rates, key=lambda r: _mean([s[0] for s in rates[r].values()]))),
    "The method runs at the reference's rate; each arm has its own best one.": _fair(rate_of=lambda m, r: r),
    "The reference runs at the method's rate; each arm has its own best one.": _fair(rate_of=lambda m, r: m),
    "These are differences of validation scores; the rates were chosen on them.": _fair(of=VALIDATION),
    "The scores are sorted before they are paired; pairs belong to one seed.":
        _fair(pair=lambda a, b: [x - y for x, y in zip(sorted(a.values()), sorted(b.values()), strict=False)]),
    "The scores are paired as they lie in the dictionaries, whose seeds come in any order.":
        _fair(pair=lambda a, b: [x - y for x, y in zip(a.values(), b.values(), strict=False)]),
    "The differences come in the dictionary's order; the seeds rise.":
        _fair(pair=lambda a, b: [a[seed] - b[seed] for seed in a if seed in b]),
    "The sign is turned: it is the method's score less the reference's.":
        lambda runs, method, reference: fair_differences(runs, reference, method),
}  # fmt: skip


@exercise(
    "5.1-d",
    points=2,
    right=fair_differences,
    mistakes=FAIR_MISTAKES,
    otherwise="A rate is not the one of the lowest mean validation score, or the pairs are not those of one seed.",
)
def check_fair_differences(draw: Draw):
    """Records of arms, rates and seeds: in any order, some seeds missing, some runs diverged, some rates equally good."""
    diverged = "Where a run diverged it goes wrong: its scores are NaN, and its rate is not chosen."
    for kind, hint in [
        ("", ""),
        ("", ""),
        ("missing", "Where a seed is missing it goes wrong: only seeds that both arms have are paired."),
        ("smallest diverged", diverged),
        ("largest diverged", diverged),
        ("equal, smaller first", "Where two rates are equally good it goes wrong: the smaller is taken."),
        ("equal, larger first", "Where two rates are equally good it goes wrong: the smaller is taken."),
        ("fewer", "Where a rate has fewer seeds it goes wrong: means are compared."),
        ("one far better", "Where one run is far better than others of its rate it goes wrong: the mean over all of a rate's seeds decides."),
    ]:  # fmt: skip
        # as text, the second of them comes before the first
        seeds = [draw.integer(4, 9), draw.integer(10, 39)]
        seeds += draw.random.sample(range(40, 100), draw.integer(2, 4))
        arms, lost = draw.random.sample(["lora", "dora", "gates"], 3), draw.random.sample(seeds, 3)
        runs = {}
        for arm, lacks in zip(arms, lost, strict=True):
            rates = draw.random.sample([1e-4, 2e-4, 5e-4, 1e-3, 2e-3], 4)
            runs[arm] = {rate: _scores(draw, seeds) for rate in rates}
            best = _chosen(runs[arm])
            others = [rate for rate in rates if rate != best]
            if kind == "missing":
                runs[arm][best] = {  # which stays the best, so that each arm lacks another seed
                    seed: (v - 1, t) for seed, (v, t) in runs[arm][best].items() if seed != lacks
                }
            elif hint == diverged:
                rate = min(rates) if kind == "smallest diverged" else max(rates)
                spoilt = dict.fromkeys(
                    runs[arm][rate], (0.5, 0.5)
                )  # very good, where it did not diverge
                spoilt[draw.choice(list(spoilt))] = (math.nan, math.nan)
                runs[arm] = {rate: spoilt} | runs[arm] | {rate: spoilt}
            elif kind.startswith("equal"):
                scores = runs[arm][best].items()
                runs[arm][others[0]] = {
                    seed: (v, t + draw.number(0.1, 0.5)) for seed, (v, t) in scores
                }
                runs[arm] = dict(sorted(runs[arm].items(), reverse=kind == "equal, larger first"))
            elif kind == "one far better":
                odd = draw.choice(seeds)  # without it another rate is best, as it is by the median
                for rate, level in zip(rates, (2.1, 2.0, 2.4, 2.6), strict=True):
                    runs[arm][rate] = {
                        seed: (
                            level
                            + draw.number(-0.02, 0.02)
                            - 1.1 * (rate == rates[0] and seed == odd),
                            test,
                        )
                        for seed, (_, test) in runs[arm][rate].items()
                    }
                del runs[arm][rates[2]][odd]
            elif kind == "fewer":
                del runs[arm][others[0]][draw.choice(list(runs[arm][others[0]])[1:])]
        method, reference = draw.random.sample(list(runs), 2)
        yield case(runs, method, reference, hint=hint)


def _scores(draw: Draw, seeds):
    """Validation and test scores of one rate; what is best on one text is often not on the other."""
    order = draw.random.sample(seeds, len(seeds))
    level, luck = draw.number(2, 2.4), draw.choice(order)
    return {
        seed: (
            level + draw.number(-0.1, 0.1) - 0.6 * draw.integer(0, 1) * (seed == luck),
            level + draw.number(-0.3, 0.3),
        )
        for seed in order
    }
