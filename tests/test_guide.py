"""Chapter 5.1's guide rests on claims that exist, and says of them what the ledger says."""

import json
import re

from tools.run_chapters import ROOT

CHAPTER = ROOT / "notebooks" / "5_1_comparison.md"


def claims_in(stem: str) -> set[str]:
    """The ids of the claims that a chapter's text makes."""
    return set(
        re.findall(
            r'claims\.add\(\s*"(\d\.\d-[a-z])"',
            next((ROOT / "notebooks").glob(f"{stem}_*.md")).read_text(),
        )
    )


def test_each_line_of_the_guide_rests_on_claims_that_exist() -> None:
    text = CHAPTER.read_text()
    guide = text.split("## Which one, when")[1].split("\n## ")[0]
    lines = [line for line in guide.splitlines() if line.startswith("|")][2:]
    assert len(lines) >= 8
    for line in lines:
        assert re.search(r"\d\.\d-[a-z]", line.rsplit("|", 2)[1]), f"no claim behind: {line}"
    for identifier in set(re.findall(r"\b(\d\.\d-[a-z])\b", text)):
        assert identifier in claims_in(identifier[:3].replace(".", "_")), (
            f"{identifier} is no claim of its chapter"
        )


def test_the_guide_says_of_claims_what_the_ledger_says() -> None:
    # ✗ behind an id: it did not hold. Compared with the newest execution of each chapter, where there is one.
    cited = re.findall(
        r"\b(\d\.\d-[a-z])( ✗)?",
        CHAPTER.read_text().split("## Which one, when")[1].split("\n## ")[0],
    )
    for identifier, failed in cited:
        stem = next((ROOT / "notebooks").glob(f"{identifier[:3].replace('.', '_')}_*.md")).stem
        runs = sorted(
            (ROOT / "build" / "executed").glob(f"{stem}-*/claims/{stem}.json"),
            key=lambda path: path.stat().st_mtime,
        )
        if runs:
            held = {
                claim["id"]: claim["holds"] for claim in json.loads(runs[-1].read_text())["claims"]
            }
            assert held.get(identifier) == (not failed), (
                f"{identifier}: the guide and the ledger differ"
            )
