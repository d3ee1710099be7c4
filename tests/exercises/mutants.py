"""Small changes of a solution, one at a time: constants, operators, transposes, arguments, lines that are dropped.

for label, source in mutants("def f(x):\\n    return x + 1"):     # "x + 1 → x - 1", "1 → 2", …
"""

import ast
import copy
from collections.abc import Iterator

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or,
    ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
NAMES = {
    "min": "max", "amin": "amax", "argmin": "argmax", "floor": "ceil", "sum": "mean", "minimum": "maximum", "zeros": "ones",
    "zeros_like": "ones_like", "all": "any", "softmax": "log_softmax", "round": "floor", "square": "abs",
}  # fmt: skip
NAMES |= {b: a for a, b in NAMES.items() if b not in NAMES}


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """`(what was changed, the changed source)` for each change of `source`."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    for number, node in enumerate(nodes):
        for changed in _changes(node):
            mutant = copy.deepcopy(tree)
            around = _replace(mutant, number, changed)
            if around is not None:
                before = ast.unparse(nodes[around[0]])
                after = "nothing" if changed is None else ast.unparse(around[1])
                label = " ".join(f"{before} → {after}".split())
                yield label, ast.unparse(ast.fix_missing_locations(mutant))


def _changes(node: ast.AST) -> Iterator[ast.AST | None]:
    """What may stand in the node's place; None for nothing."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(node.value + 1)
        if isinstance(node.value, int) or node.value != 0:
            yield ast.Constant(node.value - 1 if isinstance(node.value, int) else 0.0)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.BinOp):
        if type(node.op) in OPERATORS:
            yield ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right)
        if not isinstance(node.op, ast.Add | ast.Mult | ast.BitAnd | ast.BitOr):
            yield ast.BinOp(node.right, node.op, node.left)
        yield from (node.left, node.right)
    elif isinstance(node, ast.AugAssign):
        if type(node.op) in OPERATORS:
            yield ast.AugAssign(node.target, OPERATORS[type(node.op)](), node.value)
        yield None
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        yield ast.Compare(
            node.left, [OPERATORS[type(node.ops[0])](), *node.ops[1:]], node.comparators
        )
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(OPERATORS[type(node.op)](), node.values)
        yield from node.values
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse)
    elif isinstance(node, ast.Attribute) and node.attr in ("T", "mT"):
        yield node.value
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield ast.Attribute(node.value, NAMES[node.attr], node.ctx)
    elif isinstance(node, ast.Name) and node.id in NAMES and isinstance(node.ctx, ast.Load):
        yield ast.Name(NAMES[node.id], node.ctx)
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        yield node.value
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield ast.comprehension(node.target, node.iter, [], node.is_async)
    elif isinstance(node, ast.If):
        yield from (ast.If(ast.Constant(value), node.body, node.orelse) for value in (True, False))
    elif (
        isinstance(node, ast.Assign | ast.For | ast.With | ast.Continue | ast.Break)
        or isinstance(node, ast.Expr)
        and not isinstance(node.value, ast.Constant)
    ):
        yield None


def _calls(node: ast.Call) -> Iterator[ast.AST]:
    """Without the call, without one of its arguments, with two of them exchanged."""
    if isinstance(node.func, ast.Attribute) and not (
        isinstance(node.func.value, ast.Name)
        and node.func.value.id in ("torch", "F", "math", "nn", "np")
    ):
        yield node.func.value
    if node.args:
        yield node.args[0]
    for i in range(len(node.keywords)):
        yield ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :])
    for i in range(len(node.args)):
        yield ast.Call(node.func, node.args[:i] + node.args[i + 1 :], node.keywords)
    symmetric = isinstance(node.func, ast.Name) and node.func.id in ("min", "max")
    if len(node.args) > 1 and not symmetric:
        yield ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)


def _replace(tree: ast.AST, number: int, new: ast.AST | None) -> tuple[int, ast.AST] | None:
    """Puts `new` in the place of the node of that number in `ast.walk`; None where it can't stand there.

    Returns the number of the node that names the change, and the changed one: the smallest expression around it that is more
    than a constant or a name, or the node itself where it is dropped.
    """
    nodes = list(ast.walk(tree))
    old = nodes[number]
    parents = {id(child): parent for parent in nodes for child in ast.iter_child_nodes(parent)}
    around, small = old, (ast.Constant, ast.Name, ast.keyword, ast.operator)
    small += (ast.UnaryOp,) if isinstance(getattr(old, "operand", None), ast.Constant) else ()
    while new is not None and isinstance(around, small):
        around = parents[id(around)]
    parent = parents.get(id(old))
    for name, value in ast.iter_fields(parent) if parent else ():
        if value is old and new is not None:
            setattr(parent, name, new := copy.deepcopy(new))
            return nodes.index(around), new if around is old else around
        if isinstance(value, list) and any(item is old for item in value):
            at = next(i for i, item in enumerate(value) if item is old)
            value[at : at + 1] = [new := copy.deepcopy(new)] if new is not None else []
            if not value and name == "body":
                value.append(ast.Pass())
            return nodes.index(around), (
                new if around is old else around
            ) if new is not None else around
    return None
