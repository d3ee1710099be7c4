"""A release: the tag says the version that the files state, and its notes are the version's part of CHANGELOG.md.

python -m tools.release --check v0.1.0      exit 1 if the tag is another version's, notes are missing, or pages call it unpublished
python -m tools.release --notes             print the notes
"""

import argparse
import re

from tools import facts


def part(changelog: str, heading: str) -> str:
    """What stands in a changelog under `## <heading>`, without that line; empty where there is nothing."""
    found = re.search(
        rf"^## {re.escape(heading)}(?![\w.]).*\n((?s:.*?))(?=^## |\Z)", changelog, re.MULTILINE
    )
    return found[1].strip() if found else ""


def notes(changelog: str, version: str) -> str:
    """The part of a changelog under `## <version>`, without its heading."""
    if not (text := part(changelog, version)):
        raise SystemExit(f"CHANGELOG.md: nothing under `## {version}`")
    return text + "\n"


def check(tag: str, changelog: str) -> None:
    """Raises SystemExit where the tag, the notes or the files that are released would not tell the truth."""
    known = facts.read()
    if tag != f"v{known.version}":
        raise SystemExit(
            f"the tag is {tag}; pyproject.toml says {known.version}, so it should be v{known.version}"
        )
    if not known.published:
        raise SystemExit("pyproject.toml: set `published = true` and run `make facts`; until then pages say that nothing is published")  # fmt: skip
    if part(changelog, "Unreleased"):
        raise SystemExit(
            f"CHANGELOG.md: what stands under `## Unreleased` is not in the notes of {known.version}; give it its version"
        )
    stale = [path.name for path in facts.stale_files()]
    if stale:
        raise SystemExit(f"run `make facts`: {', '.join(stale)} state another version or address")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", metavar="TAG")
    parser.add_argument("--notes", action="store_true")
    given = parser.parse_args()
    changelog = (facts.ROOT / "CHANGELOG.md").read_text()
    text = notes(changelog, facts.read().version)
    if given.check:
        check(given.check, changelog)
    if given.notes:
        print(text, end="")


if __name__ == "__main__":
    main()
