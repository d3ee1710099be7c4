"""What runs inside a student's sandbox: it loads the student's code and answers the judge's calls.

    python -I runner.py '{"uid": 61234, "limits": {...}, "path": [...]}'

It stands alone beside wire.py: the rest of lora_course.classroom is not to be seen from here. Requests come from stdin,
answers go to the stdout that the process was started with; what a student prints goes nowhere. Each problem is loaded in
a fork of its own, so that nothing of one (default dtype, patched modules, an exit) reaches the next.
"""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import sys
from typing import Any

IPYTHON = re.compile(r"\s*([%!?]|[\w.*]+\?{1,2}\s*$)")
"""A magic, a command of the shell, or a question (`topk?`): so begins a line that is IPython's, if it is no Python."""


def send(stream: int, message: bytes) -> None:
    view = memoryview(len(message).to_bytes(8, "little") + message)
    while view:
        view = view[os.write(stream, view) :]


def receive(stream: int) -> bytes:
    def take(count: int) -> bytes:
        parts = []
        while count:
            part = os.read(stream, min(count, 1 << 20))
            if not part:
                os._exit(0)  # the judge is gone
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    return take(int.from_bytes(take(8), "little"))


def plain_python(source: str) -> str:
    """A cell without IPython's lines: they are kept as comments, so that line numbers stay.

    Only a line at which Python stops can be one: `% block` within brackets goes on with the line above it.
    """
    lines = source.split("\n")
    while True:
        text = "\n".join(lines)
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            at = (getattr(error, "lineno", None) or 0) - 1
            if not 0 <= at < len(lines) or not IPYTHON.match(lines[at]):
                return text
            lines[at] = f"#{lines[at]}"
        else:
            return text


def defined(node: ast.stmt) -> set[str]:
    """The names that a statement binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    names = (n for n in ast.walk(node) if isinstance(n, ast.Name))
    return {n.id for n in names if isinstance(n.ctx, ast.Store)}


def used(node: ast.stmt) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def needed(own: list[ast.stmt], answer: list[ast.stmt]) -> list[ast.stmt]:
    """Of a student's own cells the definitions, imports and values that the answer uses, directly or not, in their order.

    So an experiment that a student left in the notebook isn't run again.
    """
    wanted = set().union(*(used(node) for node in answer), ())
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    chosen: set[int] = set()
    while True:
        more = {
            i
            for i, node in enumerate(own)
            if i not in chosen and isinstance(node, kinds) and defined(node) & wanted
        }
        if not more:
            return [own[i] for i in sorted(chosen)]
        chosen |= more
        wanted |= set().union(*(used(own[i]) for i in more))


def load(name: str, answer: str, own: list[str], setup: str) -> tuple[dict[str, Any], str]:
    """Runs what is needed; → the student's names, and why the function isn't there ("" where it is)."""
    try:
        body = ast.parse(plain_python(answer)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        where = f" in line {line} of the answer cell" if line else ""
        return {}, f"{type(error).__name__}{where}: {getattr(error, 'msg', None) or error}"
    helpers: list[ast.stmt] = []
    for source in own:
        try:
            helpers += ast.parse(plain_python(source)).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # a cell of notes: if the answer needs it, its NameError will say so
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(setup, names)  # noqa: S102
    trouble = ""
    for node in [*needed(helpers, body), *body]:
        if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            continue  # prints, tries, calls of checks
        try:
            exec(compile(ast.Module([node], []), "<answer>", "exec"), names)  # noqa: S102
        except BaseException as error:
            trouble = trouble or f"{type(error).__name__}: {str(error)[:200]}"
    if not callable(names.get(name)):
        return names, trouble or f"There is no function {name}"
    return names, ""


def place(error: BaseException) -> str:
    """The line of the answer cell in which an error arose."""
    lines, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<answer>":
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f" in line {lines[-1]} of its cell" if lines else ""


def serve(requests: int, answers: int, opening: dict[str, Any]) -> None:
    """Answers calls of one problem's function until the judge closes it."""
    import torch
    import wire

    names, trouble = load(opening["name"], opening["answer"], opening["own"], opening["setup"])
    call: Any = names.get(opening["name"])
    tensors, gradients = wire.Tensor, torch.autograd.grad
    send(answers, wire.encode({"trouble": trouble}))
    inputs: list[Any] = []
    results: list[Any] = []
    while True:
        request = wire.decode(receive(requests))
        if request["kind"] == "close":
            return
        try:
            if request["kind"] == "call":
                inputs = list(request["arguments"])
                result = call(*inputs)
                results = list(result) if isinstance(result, list | tuple) else [result]
                reply = {"result": result, "after": inputs}
            else:
                parts = [r for r in results if isinstance(r, tensors) and r.requires_grad]
                leaves = [x for x in inputs if isinstance(x, tensors) and x.requires_grad]
                found = gradients(
                    parts, leaves, request["upstream"], allow_unused=True, retain_graph=True
                )
                reply = {"gradients": list(found)}
            message = wire.encode(reply)
        except BaseException as error:
            text = str(error)[:300] if not isinstance(error, RecursionError) else "too deep"
            reply = {"error": type(error).__name__[:50], "text": text, "where": place(error)}
            message = wire.encode(reply)
        send(answers, message)


def confine(settings: dict[str, Any]) -> None:
    """Lays down what the process may use, and its rights: nothing of it can be taken back later."""
    for name, value in settings["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    if settings["uid"]:
        os.setgroups([])
        os.setresgid(settings["uid"], settings["uid"], settings["uid"])
        os.setresuid(settings["uid"], settings["uid"], settings["uid"])


def main() -> None:
    settings = json.loads(sys.argv[1])
    requests, answers = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    sys.path[:0] = settings["path"]
    import torch
    import wire

    torch.set_num_threads(1)
    confine(settings)
    os.chdir(settings["home"])
    send(answers, wire.encode({"ready": True}))
    while True:
        opening = wire.decode(receive(requests))
        child = os.fork()
        if child == 0:
            try:
                serve(requests, answers, opening)
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 70)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        send(answers, wire.encode({"closed": code}))


if __name__ == "__main__":
    main()
