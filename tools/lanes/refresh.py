"""Fetches today's package lists of Colab and Kaggle into tests/images/; says which changed.

    python -m tools.lanes.refresh

Colab publishes its list in googlecolab/backend-info. Kaggle builds on a dated Colab image, named in Kaggle/docker-python, so
its list is Colab's as it was on that day.
"""

import json
import os
import re
import urllib.request
from collections.abc import Callable

from tools.chapters import ROOT

COLAB, KAGGLE = "googlecolab/backend-info", "Kaggle/docker-python"
LIST = "pip-freeze.gpu.txt"
Fetch = Callable[[str], str]


def fetch(address: str) -> str:
    """The text at an address; the token of a workflow, if there is one, lifts GitHub's limit on questions."""
    token = os.environ.get("GITHUB_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token and "api.github.com" in address else {}
    with urllib.request.urlopen(
        urllib.request.Request(address, headers=headers), timeout=60
    ) as answer:
        return answer.read().decode()


def last_commit(fetch: Fetch, repository: str, path: str, until: str = "") -> tuple[str, str]:
    """SHA and day of the last commit that changed a file, up to a day."""
    query = f"path={path}&per_page=1" + (f"&until={until}T23:59:59Z" if until else "")
    (commit,) = json.loads(fetch(f"https://api.github.com/repos/{repository}/commits?{query}"))
    return commit["sha"], commit["commit"]["committer"]["date"][:10]


def listed(fetch: Fetch, until: str = "") -> tuple[str, str]:
    """Where a list is from, in words, and the list."""
    sha, day = last_commit(fetch, COLAB, LIST, until)
    text = fetch(f"https://raw.githubusercontent.com/{COLAB}/{sha}/{LIST}")
    return f"{COLAB} {LIST} at {sha[:7]} ({day})", text


def lists(fetch: Fetch = fetch) -> dict[str, str]:
    """Name of the file under tests/images/ → its text."""
    origin, colab = listed(fetch)
    config = fetch(f"https://raw.githubusercontent.com/{KAGGLE}/main/config.txt")
    found = re.search(r"(20\d\d)(\d\d)(\d\d)-\d{6}", config)
    if not found:
        raise ValueError(f"{KAGGLE}/config.txt names no dated Colab image: {config[:200]!r}")
    older, kaggle = listed(fetch, "-".join(found.groups()))
    return {
        "colab-gpu.txt": f"# {origin}\n{colab}",
        "kaggle.txt": f"# Kaggle builds on Colab's image {found[0]}; this is {older}\n{kaggle}",
    }


def main() -> None:
    for name, text in lists().items():
        path = ROOT / "tests" / "images" / name
        changed = not path.exists() or path.read_text() != text
        path.write_text(text)
        print(f"{path.relative_to(ROOT)}: {'changed' if changed else 'as it was'}")


if __name__ == "__main__":
    main()
