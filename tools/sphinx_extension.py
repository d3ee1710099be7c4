"""A Sphinx extension with two adjustments of the book.

Docstrings are plain text with `code` in single backticks, as they are read in an editor: what reStructuredText would take for
markup (`|x|`, `*`, `x_`) is escaped, and single backticks become literals. What is indented under a blank line, before any
`Args:`, is an equation or an example, and stays as it is written.

sphinx-thebe, which Jupyter Book always loads, is taken out: it writes its script twice into each page (a console error), with
the address of a CDN in it.
"""

import re
from typing import Any

from sphinx.application import Sphinx

CODE = re.compile(r"(``[^`]+``|`[^`]+`)")
SECTION = re.compile(r"^\w+:$", re.MULTILINE)
BLOCK = re.compile(r"(?<=\n\n)((?: {4}.*\n|\n(?= {4}))+)")
MARKUP = re.compile(r"([*|\\]|(?<=\w)_(?=\W|$))")


def escape(text: str) -> str:
    """One docstring's text as reStructuredText that renders as it reads."""
    parts = CODE.split(text)
    for index, part in enumerate(parts):
        if index % 2:
            touching = index + 1 < len(parts) and re.match(r"[\w(\[]", parts[index + 1])
            parts[index] = f"``{' '.join(part.strip('`').split())}``" + ("\\ " if touching else "")
        else:
            parts[index] = MARKUP.sub(r"\\\1", part)
    return "".join(parts)


def render(text: str) -> str:
    """A docstring as reStructuredText: its indented blocks literal, the rest escaped."""
    section = SECTION.search(text)
    head, tail = (text[: section.start()], text[section.start() :]) if section else (text, "")
    parts = BLOCK.split(head)  # blocks are at the odd places
    parts[1::2] = [f"::\n\n{block.rstrip()}\n\n" for block in parts[1::2]]
    parts[::2] = [escape(part) for part in parts[::2]]
    return "".join(parts) + escape(tail)


def process(app: Sphinx, what: str, name: str, object: Any, options: Any, lines: list[str]) -> None:
    lines[:] = render("\n".join(lines)).split("\n")


def drop_thebe(app: Sphinx, config: Any) -> None:
    for listeners in app.events.listeners.values():
        listeners[:] = [
            listener for listener in listeners if listener.handler.__module__ != "sphinx_thebe"
        ]
    app.registry.css_files[:] = [
        css for css in app.registry.css_files if css[0] != "sphinx-thebe.css"
    ]


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon, at 500
    app.connect("config-inited", drop_thebe)
    return {"parallel_read_safe": True}
