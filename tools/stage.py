"""What the book is built from: the repository's own layout (book/, notebooks/, _config.yml, _toc.yml), with executed chapters
in the place of sources and with the generated parts of the pages filled in."""

import hashlib
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

from tools import facts, pages, published
from tools.chapters import ROOT, Result
from tools.crosslinks import with_uses
from tools.fingerprint import DISTRIBUTIONS
from tools.playpage import pack


def staged_files(root: Path, results: list[Result]) -> Iterator[tuple[str, bytes]]:
    """Path in the stage → content, of every file that the book is built from."""
    yield "_config.yml", (root / "_config.yml").read_bytes()
    toc = contents((root / "_toc.yml").read_text(), {result.stem for result in results})
    yield "_toc.yml", toc.encode()
    for path in sorted((root / "book").rglob("*")):
        name = path.relative_to(root)
        if path.is_dir() or "_data" in name.parts:
            continue
        content = path.read_bytes()
        if path.suffix == ".md":
            text = pages.fill(content.decode(), root, results)
            if path.name == "glossary.md":
                sources = pages.sources(root, results)
                text = with_uses(text, {stem: path.read_text() for stem, path in sources.items()})
            content = with_links_to(text, {result.stem for result in results}).encode()
        yield name.as_posix(), content
    for name, content in pack.packed(root):
        yield f"book/_static/play/data/{name}", content
    for module in pages.api_modules(root):
        yield f"book/api/{pages.api_stem(module)}.md", pages.api_page(module).encode()
    for name in ("lab.css", "moving.js"):  # outputs carry them; the pages load them once instead
        yield f"book/_static/{name}", (ROOT / "lora_course" / "lab" / name).read_bytes()
    there = {result.stem for result in results}
    for result in results:
        yield f"notebooks/{result.stem}.ipynb", published.notebook(result, root, there).encode()


def with_links_to(text: str, there: set[str]) -> str:
    """A page whose links to chapters that are not in this build lead to the published book."""
    book = facts.read().book
    return re.sub(
        r"\]\(\.\./notebooks/(\w+)\.ipynb",
        lambda link: link[0] if link[1] in there else f"]({book}/notebooks/{link[1]}.html",
        text,
    )


def contents(text: str, there: set[str]) -> str:
    """The table of contents with the chapters of this build alone."""
    lines = text.splitlines(keepends=True)
    files = [re.search(r"file: notebooks/(\w+)", line) for line in lines]
    kept = "".join(line for line, file in zip(lines, files) if not file or file[1] in there)
    return re.sub(r"  - caption: .*\n    chapters:\n(?!      )", "", kept)


def stage(root: Path, results: list[Result], target: Path) -> tuple[str, str]:
    """Write the stage into `target`, touching only what changed; return a hash of everything the book is made from, and one of its frame.

    The frame is what shapes every page: settings, theme, and which pages there are. When it changes, Sphinx starts afresh,
    as it would leave pages in place that it does not think of as changed.
    """
    digest, frame = hashlib.sha256(), hashlib.sha256()
    for distribution in DISTRIBUTIONS:
        frame.update(importlib.metadata.version(distribution).encode())
    frame.update((ROOT / "tools" / "sphinx_extension.py").read_bytes())
    wanted = set()
    for name, content in staged_files(root, results):
        path = target / name
        wanted.add(path)
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
        frame.update(content if name.startswith("_") else name.encode())
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for path in [p for p in target.rglob("*") if p.is_file()]:
        if path not in wanted:
            path.unlink()
    for path in sorted((root / "lora_course").rglob("*.py")):  # the API pages quote its docstrings
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update(frame.digest())
    return digest.hexdigest(), frame.hexdigest()
