"""A Sphinx extension with the book's adjustments.

Docstrings are plain text with `code` in single backticks, as they are read in an editor: what reStructuredText would take for
markup (`|x|`, `*`, `x_`) is escaped, and single backticks become literals. What is indented under a blank line, before any
`Args:`, is an equation or an example, and stays as it is written.

Pages: a description and a card for those who send a link; Kaggle in the launch menu; Chinese marked as such for screen
readers; search that finds parts of Chinese terms and puts chapters before the API. Where a chapter first links to a step of the page
that plays (`play.md#try-rank`), the step itself stands under the paragraph; it loads nothing before a reader asks. Outputs carry their style and script for
Colab; a page of the book loads both once from `_static`.

sphinx-thebe, which Jupyter Book always loads, is taken out: it writes its script twice into each page (a console error), with
the address of a CDN in it.
"""

import html
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.search import SearchEnglish, languages

from tools import facts

CODE = re.compile(r"(``[^`]+``|`[^`]+`)")
SECTION = re.compile(r"^\w+:$", re.MULTILINE)
BLOCK = re.compile(r"(?<=\n\n)((?: {4}.*\n|\n(?= {4}))+)")
CHINESE = re.compile(r"([\u4e00-\u9fff][\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]*)")
CARRIED = re.compile(r"<(style|script) data-lab>.*?</\1>", re.DOTALL)
KNOWN = facts.read()
KAGGLE = "https://kaggle.com/kernels/welcome?src="
LENGTH = 160  # characters of a description that search engines show
PLAYED = re.compile(r'<a\b[^>]*href="\.\./book/play\.html#try-(\w+)"')
STEP = """<div class="play-here"><button type="button" hidden>▶ Try it here</button> <span role="status"></span>
<div class="play" data-try="{}"></div></div>
"""
EMBED = '<script src="../_static/play/embed.js"></script>\n'
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


def load_once(app: Sphinx, doctree: nodes.document) -> None:
    """Take out the style and script that outputs carry; `_config.yml` loads them as files."""
    for raw in list(doctree.findall(nodes.raw)):
        if "data-lab" in raw.astext():
            raw.children[:] = [nodes.Text(CARRIED.sub("", raw.astext()))]


def mark_chinese(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Chinese in running text gets lang="zh": docutils makes that of the class language-zh."""
    for text in list(doctree.findall(nodes.Text)):
        parts = CHINESE.split(text.astext())
        if len(parts) == 1 or isinstance(
            text.parent, nodes.literal | nodes.literal_block | nodes.raw
        ):
            continue
        text.parent.replace(
            text,
            [
                nodes.inline(part, part, classes=["language-zh"]) if i % 2 else nodes.Text(part)
                for i, part in enumerate(parts)
                if part
            ],
        )


class Search(SearchEnglish):
    """English, with each pair of neighbouring signs of a Chinese term as a word of its own."""

    def split(self, input: str) -> list[str]:
        words = super().split(input)
        runs = [run for word in words for run in re.findall(r"[\u4e00-\u9fff]+", word)]
        pairs = [run[i : i + 2] for run in runs for i in range(len(run) - 1)]
        return list(dict.fromkeys([*words, *runs, *pairs])) if runs else words


def describe(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Description and Open Graph tags from the page's first paragraph of text, and Kaggle beside Colab."""
    if doctree is not None:
        title = html.escape(re.sub(r"<[^>]+>", "", context.get("title", "")), quote=True)
        text = html.escape(first_sentences(doctree), quote=True)
        home = [("property", "og:url", f"{KNOWN.book}/{page}.html")] if KNOWN.published else []
        context["metatags"] = context.get("metatags", "") + "".join(
            f'<meta {key}="{name}" content="{value}">\n'
            for key, name, value in [
                ("name", "description", text),
                ("property", "og:type", "article"),
                ("property", "og:site_name", html.escape(app.config.html_title, quote=True)),
                ("property", "og:title", title),
                ("property", "og:description", text),
                *home,
            ]
        )
    for group in context.get("header_buttons", []):
        if group.get("label") == "launch-buttons":
            for colab in [link for link in group["buttons"] if link.get("text") == "Colab"]:
                repository = "https://github.com/" + colab["url"].split("/github/")[1]
                group["buttons"].append(
                    colab | {"text": "Kaggle", "tooltip": "Launch on Kaggle", "icon": "fab fa-kaggle", "url": KAGGLE + repository}
                )  # fmt: skip


def play_here(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Puts each step of the page that plays under the paragraph or table of a chapter that links to it first."""
    body = context.get("body", "")
    if not page.startswith("notebooks/") or not PLAYED.search(body):
        return
    first = {link[1]: link.start() for link in reversed(list(PLAYED.finditer(body)))}
    for name, start in sorted(first.items(), key=lambda item: -item[1]):
        in_table = body.rfind("<table", 0, start) > body.rfind("</table>", 0, start)
        end = "</table>\n</div>" if in_table else "</p>"
        place = body.index(end, start) + len(end)
        body = body[:place] + STEP.format(name) + body[place:]
    context["body"] = body + EMBED


def first_sentences(doctree: nodes.document) -> str:
    """As much of the first paragraph of prose (no line of links) as a search engine shows."""
    for paragraph in doctree.findall(nodes.paragraph):
        words = [t for t in paragraph.findall(nodes.Text) if not isinstance(t.parent, nodes.raw)]
        text = " ".join("".join(words).split())
        if len(text) > 60 and text.count(" · ") < 2:
            return text if len(text) <= LENGTH else text[:LENGTH].rsplit(" ", 1)[0] + " …"
    return ""


def use_own_search(app: Sphinx, config: Any) -> None:
    languages["en"] = Search
    config.html_search_scorer = str(Path(app.srcdir) / "book" / "_static" / "scorer.js")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon, at 500
    app.connect("config-inited", drop_thebe)
    app.connect("config-inited", use_own_search)
    app.connect("doctree-read", load_once)
    app.connect("doctree-resolved", mark_chinese)
    app.connect("html-page-context", describe, priority=900)  # after the theme's buttons
    app.connect("html-page-context", play_here)
    return {"parallel_read_safe": True}
