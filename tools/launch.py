"""What readers click, in two forms: `published` under `[tool.lora-course]` in pyproject.toml decides which one stands.

While it is false nothing is at the project's addresses, so no page offers a link to them, and chapters lead to what launches
from a copy. Code may name the addresses: on the set-up page it is marked. `make facts` writes either form over the other.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.facts import Facts

BRANCH = "main"
BADGES = r"^\[(?:Open in Colab|Not published yet).*$"
MARK = "  # not published yet: the address of your copy"
WORDS = {  # file → what it says of launching, once published and before
    "README.md": (
        "open a notebook under [`notebooks/`](notebooks/) on Colab or Kaggle: the links are under its title.",
        "open a source under [`notebooks/`](notebooks/); for Colab or Kaggle, [launch from a copy](book/setup.md#from-a-copy).",
    ),
    "book/intro.md": (
        "the links under a chapter's title; run all cells",
        "not published yet: [launch from a copy](setup.md#from-a-copy); run all cells",
    ),
    "book/setup.md": (
        "Each chapter has links to Colab and Kaggle under its title. Its first code cell installs",
        "The course isn't published yet: on Colab and Kaggle, launch [from a copy](#from-a-copy).\nA chapter's first code cell installs",
    ),
}


def chapter_badges(facts: Facts, stem: str) -> str:
    """The line under a chapter's title: plain Markdown links, readable on Colab and GitHub."""
    if not facts.published:
        return "[Not published yet: how to launch from a copy](../book/setup.md#from-a-copy)"
    path = f"{facts.slug}/blob/{BRANCH}/notebooks/{stem}.ipynb"
    return (
        f"[Open in Colab](https://colab.research.google.com/github/{path}) · "
        f"[Open in Kaggle](https://kaggle.com/kernels/welcome?src=https://github.com/{path}) · "
        f"[Executed notebook]({facts.book}/_sources/notebooks/{stem}.ipynb) · "
        f"[Source](https://github.com/{path.removesuffix('.ipynb')}.md)"
    )


def installs(facts: Facts, text: str) -> str:
    """A chapter's text with the address that its lines install from; before there is one, with a place for the copy's owner."""
    owner, name = facts.slug.split("/") if facts.published else ("YOU", facts.slug.split("/")[1])
    return re.sub(
        r"pip install git\+https://github\.com/[\w-]+/[\w.-]+",
        f"pip install git+https://github.com/{owner}/{name}",
        text,
    )


def readme_badges(facts: Facts) -> str:
    def badge(text: str, label: str, value: str, colour: str, target: str) -> str:
        return f"[![{text}](https://img.shields.io/badge/{label}-{value}-{colour})]({target})"

    licences = [
        badge("code: Apache-2.0", "code", "Apache--2.0", "495057", "LICENSE"),
        badge("prose: CC BY 4.0", "prose", "CC_BY_4.0", "495057", "LICENSE-prose"),
    ]
    if not facts.published:
        how = "[Not published yet: how to launch from a copy](book/setup.md#from-a-copy)"
        return " ".join([how, *licences])
    workflow, version = f"{facts.url}/actions/workflows/ci.yml", facts.version
    releases = badge(f"version {version}", "version", version, "0b7285", f"{facts.url}/releases")
    return " ".join([f"[![CI]({workflow}/badge.svg)]({workflow})", releases, *licences])


def rules(facts: Facts) -> dict[str, list[tuple[str, str]]]:
    """File → pairs of a pattern and what stands in its place, for all files but chapters."""
    found = {
        name: [("|".join(map(re.escape, forms)), forms[not facts.published])]
        for name, forms in WORDS.items()
    }
    mark = "" if facts.published else MARK
    found["README.md"] += [(r"^\[(?:!\[CI\]|Not published yet).*$", readme_badges(facts))]
    found["book/setup.md"] += [
        (r"^git clone .*\ncd .*$", f"git clone {facts.url}{mark}\ncd {facts.slug.split('/')[1]}"),
        (r"^pip install git\+.*$", f"pip install git+{facts.url}{mark}"),
    ]
    on = str(facts.published).lower()
    buttons = "launch_buttons:\n  colab_url: https://colab.research.google.com\n\n"
    found["_config.yml"] = [
        (r"^(?:launch_buttons:\n(?:  .*\n)+\n)?html:$", buttons * facts.published + "html:"),
        (r"(?<=^  use_repository_button: ).*$", on),
        (r"(?<=^  use_issues_button: ).*$", on),
    ]
    return found
