"""What a cell shows besides figures and tables: an error that was expected, the source of what is taught, a sentence."""

import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from IPython.display import Markdown, display

WIDTH = 88  # columns of code and text in a page


def fails(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
    """Runs what is expected to break and prints the error's kind and its first line, folded to the width of a page.

    Raises AssertionError if it does not break: a chapter that shows a defect fails when the defect is gone.
    """
    try:
        function(*arguments, **keywords)
    except Exception as error:  # any error is the point of the call
        lines = str(error).strip().splitlines()
        said = f"{type(error).__name__}: {lines[0] if lines else ''}"
        print(
            textwrap.fill(
                said,
                WIDTH,
                subsequent_indent="    ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
        return
    raise AssertionError(
        f"{getattr(function, '__name__', function)} was expected to fail and did not"
    )


def show_source(*objects: Any) -> None:
    """Displays the source of functions or classes as it is in the installed package: what is shown is what is tested."""
    text = "\n\n\n".join(inspect.getsource(item).rstrip() for item in objects)
    display(Markdown(f"```python\n{text}\n```"))


def say(text: str) -> None:
    """Displays a sentence (Markdown): how a measured number gets into the text."""
    display(Markdown(text))
