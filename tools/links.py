"""Asks every https address in the prose whether it is there. Needs the network, and nothing that is installed.

python -m tools.links       exit 1 if one is gone

The project's own addresses, repository and book, are left out while they are placeholders: until something answers there,
nothing below can.
"""

import re
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools import facts

ADDRESS = re.compile(r"https://[^\s)>\]\"'`]+")
BROWSER = {"User-Agent": "Mozilla/5.0 (link check)"}
SHY = (401, 403, 405, 429, 999)  # there, but not for programs


def addresses(root: Path = facts.ROOT) -> dict[str, str]:
    """Address without its fragment → the file that names it first."""
    found: dict[str, str] = {}
    for path in [
        *sorted(root.glob("*.md")),
        *sorted((root / "book").rglob("*.md")),
        *sorted((root / "notebooks").glob("*.md")),
    ]:
        for address in ADDRESS.findall(path.read_text()):
            if "{" not in address:
                found.setdefault(address.partition("#")[0].rstrip(".,;:"), path.name)
    return found


def trouble(address: str) -> str | None:
    """Why an address can't be reached; None if it can."""
    for attempt in range(3):
        try:
            urllib.request.urlopen(
                urllib.request.Request(address, headers=BROWSER), timeout=30
            ).close()
            return None
        except urllib.error.HTTPError as error:
            if error.code in SHY:
                return None
            reason = f"{error.code} {error.reason}"
            if error.code == 404:
                return reason
        except OSError as error:
            reason = f"{error} after {attempt + 1} attempts"
    return reason


def main() -> None:
    found, known = addresses(), facts.read()
    for home, part in ((known.url, known.slug), (known.book, known.book)):
        if not known.published and trouble(home):
            print(f"{home} does not answer: a placeholder, and left out")
            found = {address: name for address, name in found.items() if part not in address}
    with ThreadPoolExecutor(8) as pool:
        reasons = dict(zip(found, pool.map(trouble, found)))
    gone = {address: reason for address, reason in reasons.items() if reason}
    for address, reason in gone.items():
        print(f"{found[address]}: {address}: {reason}")
    print(f"{len(found)} addresses, {len(gone)} gone")
    sys.exit(bool(gone))


if __name__ == "__main__":
    main()
