"""A chapter's claims on records of other seeds: the chapter itself is executed on them, and says."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient

from lora_course.lab.claims import Claim, load_claims
from tools.chapters import CELL_TIMEOUT, ROOT, cached
from tools.other_seeds import RECORDS, VERDICTS
from tools.run_chapters import environment

PREMISES = "from lora_course.lab import claims\n\nclaims.flips = lambda *_: True"
"""Lets a claim stand of which no change of one value turns the verdict: other seeds may miss two of its conditions at once."""
TIMED = {"3.2-n"}
"""Claims on seconds: the machine decides them, and what ran beside."""


def judge(stem: str, records: Path = RECORDS, root: Path = ROOT) -> dict[str, dict[str, Any]]:
    """By claim: whether it `held` with the course's seeds, whether it `holds` with the others, and the `values` of these.

    Claims that rest on no record with other seeds are left out. A cell that raises, as where a sentence's sign turned, does
    not stop the chapter. A claim whose cell raised is left out if it did not hold before, and told of by `ValueError` if it did.
    """
    before = cached(chapter := root / "notebooks" / f"{stem}.md", root)
    if before is None:
        raise ValueError(f"execute {stem} first: python -m tools.run_chapters {stem}")
    with tempfile.TemporaryDirectory() as place:
        staged = Path(place)
        (staged / "claims").mkdir()
        shutil.copytree(root / "lora_course", staged / "lora_course")
        for record in records.glob("*.json"):
            shutil.copyfile(record, staged / "lora_course" / "data" / "studies" / record.name)
        notebook = jupytext.read(chapter)
        notebook.cells.insert(0, nbformat.v4.new_code_cell(PREMISES))
        client = NotebookClient(
            notebook,
            timeout=CELL_TIMEOUT["tiny"],
            allow_errors=True,
            resources={"metadata": {"path": place}},
        )
        client.execute(env=environment(staged, staged))
        told = errors(notebook)
        found = by_id(staged / "claims")
    known = by_id(before.folder / "claims")
    if lost := sorted(id for id in set(known) - set(found) if known[id].holds):
        raise ValueError(f"{stem} said nothing of {', '.join(lost)} with other seeds: {told}")
    return {
        id: {"held": known[id].holds, "holds": claim.holds, "values": claim.values}
        for id, claim in found.items()
        if id not in TIMED and rests_on_seeds(known[id], claim)
    }


def rests_on_seeds(before: Claim, after: Claim) -> bool:
    """Whether some value is as many numbers for each of five seeds, and others now."""
    return any(
        series and len(series) % 5 == 0 and series != before.values[name]
        for name, series in after.values.items()
    )


def by_id(folder: Path) -> dict[str, Claim]:
    return {claim.id: claim for chapter in load_claims(folder) for claim in chapter["claims"]}


def errors(notebook: Any) -> str:
    """The errors of a chapter's cells, a line each."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return "; ".join(f"{o.ename}: {o.evalue}" for o in outputs if o.output_type == "error")


def keep(stem: str, found: dict[str, dict[str, Any]], path: Path = VERDICTS) -> None:
    """Writes a chapter's verdicts beside those of the others."""
    number = stem.replace("_", ".", 1).split("_")[0]
    old = json.loads(path.read_text())["claims"] if path.exists() else {}
    kept = {id: claim for id, claim in old.items() if id.rpartition("-")[0] != number}
    text = {"claims": dict(sorted((kept | found).items()))}
    path.write_text(json.dumps(text, indent=1, ensure_ascii=False) + "\n")
