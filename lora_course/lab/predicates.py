"""Predicates over raw values: what decides whether a claim holds, and whether it could have been otherwise."""

import ast
import functools
import itertools
import statistics
from collections.abc import Callable
from types import CodeType

Values = dict[str, list[float]]
FUNCTIONS: dict[str, Callable] = {
    "mean": statistics.fmean,
    "std": lambda values: statistics.stdev(values) if len(values) > 1 else 0.0,
    "min": min, "max": max, "abs": abs, "all": all, "any": any, "zip": zip, "len": len, "sum": sum, "sorted": sorted,
}  # fmt: skip
FORBIDDEN = (
    ast.Attribute,
    ast.Lambda,
    ast.NamedExpr,
    ast.Await,
    ast.Yield,
    ast.YieldFrom,
    ast.JoinedStr,
)


def evaluate(predicate: str, values: Values) -> bool:
    """Whether a predicate holds. It may use the names in `values`, arithmetic, comparisons, comprehensions and the
    functions mean, std, min, max, abs, all, any, zip, len, sum and sorted; nothing else, attributes included.

    Raises ValueError for what is no expression, uses another name, compares a list with a number, or comes to something
    that is not True or False.
    """
    code = _compiled(predicate, tuple(values))
    try:
        verdict = eval(code, {"__builtins__": {}, **FUNCTIONS, **values})
    except TypeError as error:
        raise ValueError(
            f"predicate {predicate!r}: {error}; each value is a list, one number a seed: take mean(…) or […][0]"
        ) from None
    if not isinstance(verdict, bool):
        raise ValueError(f"predicate {predicate!r} came to {verdict!r}; expected True or False")
    return verdict


@functools.cache
def _compiled(predicate: str, names: tuple[str, ...]) -> CodeType:
    """A predicate over the values of these names, checked."""
    try:
        tree = ast.parse(predicate, mode="eval")
    except SyntaxError as error:
        raise ValueError(
            f"predicate {predicate!r} is not a Python expression: {error.msg}"
        ) from None
    for node in ast.walk(tree):
        if isinstance(node, FORBIDDEN):
            raise ValueError(
                f"predicate {predicate!r} uses {type(node).__name__}, which claims don't allow"
            )
    bound = {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if unknown := used - bound - set(names) - set(FUNCTIONS):
        raise ValueError(
            f"predicate {predicate!r} uses {', '.join(sorted(unknown))}; it knows the values {', '.join(names)} "
            f"and the functions {', '.join(FUNCTIONS)}"
        )
    return compile(tree, "<predicate>", "eval")


def perturbations(values: Values) -> list[Values]:
    """The values changed in every way that a wrong result might change them: each series scaled, shifted, negated or
    set to zero, one seed of it scaled, and each two series swapped."""
    changed = []
    for name, series in values.items():
        scaled = [
            [factor * value for value in series]
            for factor in (0.9, 1.1, 0.5, 2, 0.1, 10, -1, 0, 1e-3, 1e3)
        ]
        shifted = [[value + shift for value in series] for shift in (-1, 1)]
        single = (
            [[factor * series[0], *series[1:]] for factor in (0.1, 10)] if len(series) > 1 else []
        )
        changed += [{**values, name: new} for new in scaled + shifted + single]
    changed += [
        {**values, a: values[b], b: values[a]} for a, b in itertools.combinations(values, 2)
    ]
    return changed


def flips(predicate: str, values: Values) -> bool:
    """Whether some perturbation of the raw values turns the verdict: a check that can't fail checks nothing.

    A perturbation on which the predicate can't be computed (a division by zero) says nothing and is passed over.
    """
    holds = evaluate(predicate, values)
    for changed in perturbations(values):
        try:
            if evaluate(predicate, changed) != holds:
                return True
        except (ArithmeticError, statistics.StatisticsError):
            continue
    return False
