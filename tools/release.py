"""A release: the tag says the version that the files state, and its notes are the version's part of CHANGELOG.md.

python -m tools.release --check v0.1.0      exit 1 if the tag is another version's, or there are no notes
python -m tools.release --notes             print the notes
"""

import argparse
import re

from tools import facts


def notes(changelog: str, version: str) -> str:
    """The part of a changelog under `## <version>`, without its heading."""
    found = re.search(
        rf"^## {re.escape(version)}(?![\w.]).*\n((?s:.*?))(?=^## |\Z)", changelog, re.MULTILINE
    )
    if not found or not found[1].strip():
        raise SystemExit(f"CHANGELOG.md: nothing under `## {version}`")
    return found[1].strip() + "\n"


def check(tag: str) -> None:
    version = facts.read().version
    if tag != f"v{version}":
        raise SystemExit(
            f"the tag is {tag}; pyproject.toml says {version}, so it should be v{version}"
        )
    stale = [path.name for path in facts.stale_files()]
    if stale:
        raise SystemExit(f"run `make facts`: {', '.join(stale)} state another version or address")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", metavar="TAG")
    parser.add_argument("--notes", action="store_true")
    given = parser.parse_args()
    text = notes((facts.ROOT / "CHANGELOG.md").read_text(), facts.read().version)
    if given.check:
        check(given.check)
    if given.notes:
        print(text, end="")


if __name__ == "__main__":
    main()
