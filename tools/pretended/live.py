"""Which cells of a chapter a profile changes, told from their names: the rest runs on the CPU, the same under every profile.

cells = live([cell.source for cell in code])      # indices of these cells, and of those that they need
"""

import ast
import symtable
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

PICKED = "profile"
SHARED = {"claims", "lab", "study"}  # met everywhere; nothing of the device passes through them


@dataclass
class Cell:
    """uses: names of the notebook that its code reads. binds: those that it gives a new value. changes: those of which it
    sets an item or an attribute, or calls a method on a line of its own. inside: what each of its functions reads."""

    uses: set[str] = field(default_factory=set)
    binds: set[str] = field(default_factory=set)
    changes: set[str] = field(default_factory=set)
    inside: dict[str, set[str]] = field(default_factory=dict)


def read(source: str) -> Cell:
    cell = Cell()
    read_block(ast.parse(source).body, cell)
    return cell


def read_block(statements: Sequence[ast.stmt], cell: Cell) -> None:
    """Adds to the cell what the statements use before they bind it, one after another, also within an `if`."""
    for statement in statements:
        branches = (statement.body, statement.orelse) if isinstance(statement, ast.If) else ()
        part = statement.test if isinstance(statement, ast.If) else statement
        uses, binds = read_statement(ast.unparse(part), cell)
        loops = isinstance(statement, ast.For | ast.With)  # these bind a name before they use it
        cell.uses |= uses - cell.binds - (binds if loops else set())
        cell.binds |= binds
        before, after = cell.binds, set(cell.binds)
        for branch in branches:
            cell.binds = set(before)
            read_block(branch, cell)
            after |= cell.binds
        cell.binds = after


def read_statement(source: str, cell: Cell) -> tuple[set[str], set[str]]:
    """The notebook's names that a statement uses and binds; what it changes, and what its functions read, goes into the cell."""
    table, tree = symtable.symtable(source, "cell", "exec"), ast.parse(source)
    symbols = table.get_symbols()
    uses = {symbol.get_name() for symbol in symbols if symbol.is_referenced()}
    binds = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}
    for child in table.get_children():
        free = set(globals_of(child))
        uses |= free
        if child.get_name() in binds:
            cell.inside[child.get_name()] = free
    added = {node.target.id for node in ast.walk(tree) if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name)}  # fmt: skip
    cell.changes |= added
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store):
            cell.changes.add(root(node))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            # x.append(…), and inject(x, …)
            called, given = node.value.func, node.value.args[:1]
            cell.changes |= {root(part) for part in [called] * isinstance(called, ast.Attribute) + given}  # fmt: skip
    return uses | added, binds - added


def globals_of(table: symtable.SymbolTable) -> Iterator[str]:
    """Names of the notebook that a function or class reads."""
    for symbol in table.get_symbols():
        if symbol.is_global() and symbol.is_referenced():
            yield symbol.get_name()
    for child in table.get_children():
        yield from globals_of(child)


def root(node: ast.AST) -> str:
    """`a` of `a.b[c].d`; "" where it begins with no name."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def read_all(sources: Sequence[str]) -> list[Cell]:
    """The cells of a chapter; one that calls a function uses what that reads, as it is then."""
    cells = [read(source) for source in sources]
    inside: dict[str, set[str]] = {}
    for cell in cells:
        for name in sorted(cell.uses):
            cell.uses |= inside.get(name, set())
        inside = {name: free for name, free in inside.items() if name not in cell.binds}
        inside |= {
            name: free | {n for called in free for n in inside.get(called, ())}
            for name, free in cell.inside.items()
        }
    return cells


def picks(cells: Sequence[Cell]) -> int:
    """Index of the cell that picks the profile; -1 where none does."""
    return next((i for i, cell in enumerate(cells) if PICKED in cell.binds), -1)


def changed(cells: Sequence[Cell]) -> set[int]:
    """Indices of the cells that read `profile` or what such a cell made: under another one they compute something else."""
    first = picks(cells)
    tainted, chosen = {PICKED}, set()
    for i, cell in enumerate(cells[first + 1 :], start=first + 1):
        if cell.uses & tainted:
            chosen.add(i)
            tainted |= (cell.binds | cell.changes) - SHARED
        else:
            tainted -= cell.binds
    return chosen


def live(sources: Sequence[str]) -> list[int]:
    """Indices of the cells that a profile changes, and of those before them that they need.

    The first cells, up to the one that picks the profile, always run.
    """
    cells = read_all(sources)
    first, chosen = picks(cells), changed(cells)
    wanted: set[str] = set()
    for i in range(len(cells) - 1, first, -1):
        if i in chosen or (cells[i].binds | cells[i].changes) & wanted:
            chosen.add(i)
            wanted = (wanted - cells[i].binds) | (cells[i].uses - SHARED)
    return [*range(first + 1), *sorted(chosen)]
