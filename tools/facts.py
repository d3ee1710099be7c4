"""Writes the project's name, version and address, which stand in pyproject.toml, wherever else they appear, and whether
it is published there: `tools/launch.py` says what readers can click.

python -m tools.facts           write them
python -m tools.facts --check   say which files differ; exit 1 if any does
"""

import argparse
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tools import launch

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = "lora_course/lab/claims.py"  # its table links to the ledger, also from Colab


@dataclass(frozen=True)
class Facts:
    """The project as pyproject.toml states it."""

    name: str
    version: str
    url: str
    book: str
    published: bool

    @property
    def slug(self) -> str:
        """`owner/repository`"""
        return self.url.removeprefix("https://github.com/")


def tables(root: Path = ROOT) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())


def project(root: Path = ROOT) -> dict:
    """The table `[project]` of pyproject.toml."""
    return tables(root)["project"]


def read(root: Path = ROOT) -> Facts:
    """Raises SystemExit for an address that nobody can follow, or a book that is somebody else's."""
    stated = tables(root)
    published = stated.get("tool", {}).get("lora-course", {}).get("published")
    if not isinstance(published, bool):
        raise SystemExit(
            f"pyproject.toml: published = {published!r} under [tool.lora-course]; expected true or false"
        )
    stated = stated["project"]
    url, book = (stated["urls"][key].rstrip("/") for key in ("Repository", "Documentation"))
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+(?<!\.git)", url):
        raise SystemExit(
            f"pyproject.toml: Repository = {url!r}; expected https://github.com/<owner>/<repository>, without .git"
        )
    if re.match(r"https?://[\w-]+\.github\.io(/|$)", book) and book.lower() != pages(url).lower():
        raise SystemExit(
            f"pyproject.toml: Documentation = {book!r}, but the pages of {url} are at {pages(url)}"
        )
    return Facts(stated["name"], stated["version"], url, book, published)


def pages(url: str) -> str:
    """Where GitHub Pages puts the book of a repository."""
    owner, name = url.removeprefix("https://github.com/").split("/")
    site = f"https://{owner}.github.io"
    return site if f"https://{name}".lower() == site.lower() else f"{site}/{name}"


def setup_cell(facts: Facts) -> str:
    """The first code cell of every chapter, from tools/setup_cell.py; folded in the book."""
    code = (ROOT / "tools" / "setup_cell.py").read_text().rstrip()
    code = code.replace("OWNER/REPOSITORY", facts.slug).replace("VERSION", facts.version)
    return f"```{{code-cell}} ipython3\n:tags: [hide-input]\n\n{code}\n```"


def updated(root: Path = ROOT) -> dict[Path, str]:
    """Every file that states a fact → its text with the facts as they are."""
    facts = read(root)
    rules: dict[str, list[tuple[str, str]]] = {
        "_config.yml": [
            (r"(?<=^  url: ).*$", facts.url),
            (r"(?<=^    release: ).*$", f'"{facts.version}"'),
        ],
        CLAIMS: [(r"(?<=^BOOK = ).*$", f'"{facts.book}"')],
        "CITATION.cff": [
            (r"(?<=^version: ).*$", facts.version),
            (r"(?<=^repository-code: ).*$", facts.url),
        ],
    }
    known = re.search(
        r"^  url: https://github\.com/(\S+)$", (root / "_config.yml").read_text(), re.MULTILINE
    )
    if not known:
        raise SystemExit(
            "_config.yml: no line `  url: https://github.com/<owner>/<repository>` under `repository:`"
        )
    result = {}
    texts = [
        root / "README.md",
        root / "CONTRIBUTING.md",
        root / "_config.yml",
        root / "CITATION.cff",
        root / CLAIMS,
        *sorted((root / "book").glob("**/*.md")),
        *sorted((root / "notebooks").glob("*.md")),
    ]
    for path in texts:
        text = path.read_text().replace(known[1], facts.slug)
        name = path.relative_to(root).as_posix()
        chosen = rules.get(name, []) + launch.rules(facts).get(name, [])
        if path.parent.name == "notebooks":
            text = launch.installs(facts, text)
            chosen = [
                (launch.BADGES, launch.chapter_badges(facts, path.stem)),
                (r"^```\{code-cell\} ipython3\n(?s:.*?)^```$", setup_cell(facts)),
            ]
        for pattern, replacement in chosen:
            text, count = re.subn(
                pattern, lambda _, new=replacement: new, text, count=1, flags=re.MULTILINE
            )
            if not count:
                raise SystemExit(
                    f"{path.relative_to(root)}: no line matches {pattern!r}, so a fact of pyproject.toml can't be stated"
                )
        result[path] = text
    return result


def stale_files(root: Path = ROOT) -> dict[Path, str]:
    return {path: text for path, text in updated(root).items() if path.read_text() != text}


def write_or_check(stale: Callable[[], Mapping[Path, str]], about: str, reason: str) -> None:
    """A command that writes the files that are out of step; with --check it says `reason` of each, and exits with 1."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a file is out of step"
    )
    check, found = parser.parse_args().check, stale()
    for path, text in found.items():
        print(f"{path.relative_to(ROOT)}: {reason if check else 'written'}")
        if not check:
            path.write_text(text)
    raise SystemExit(bool(found) and check)


if __name__ == "__main__":
    write_or_check(
        stale_files, __doc__.splitlines()[0], "differs from pyproject.toml; run `make facts`"
    )
