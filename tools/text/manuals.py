"""Plain technical English, for pretraining only."""

from __future__ import annotations

import html
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tools.text.documents import Document


def general(sources: dict[str, Path]) -> Iterator[Document]:
    """Plain technical English: PostgreSQL's manual and the Jargon File. For pretraining only."""
    folder = sources["postgresql-doc-15"] / "usr/share/doc/postgresql-doc-15/html"
    skipped = re.compile(
        r"release|bookindex|sql-keywords|errcodes|features|acronyms|biblio|legalnotice"
    )
    for path in sorted(folder.glob("*.html")):
        if not skipped.match(path.name):
            page = path.read_text(encoding="utf-8")
            body = re.split(
                r'<div class="navfooter">', re.split(r'<div class="navheader">.*?<hr />', page)[-1]
            )[0]
            body = re.sub(
                r'<div class="toc">.*?</div>|<table.*?</table>', "", body, flags=re.DOTALL
            )
            blocks = re.findall(r"<(h\d|p|pre|dt)\b[^>]*>(.*?)</\1>", body, re.DOTALL)
            lines = []
            for tag, block in blocks:
                text = html.unescape(re.sub(r"<[^>]+>", "", block))
                lines.append(text.strip("\n") if tag == "pre" else " ".join(text.split()))
            text = "\n".join(line for line in lines if line)
            if len(text) > 500:
                yield Document("train", f"postgresql/{path.stem}", text + "\n")
    jargon = sources["jargon-text"] / "usr/share/doc/jargon-text/jargon.txt.gz"
    text = subprocess.run(["gzip", "-dc", str(jargon)], capture_output=True).stdout.decode("utf-8")
    paragraphs = [" ".join(block.split()) for block in re.split(r"\n\s*\n", text)]
    paragraphs = [p for p in paragraphs if len(p) > 2]
    for number, start in enumerate(range(0, len(paragraphs), 100)):
        yield Document(
            "train", f"jargon/{number:03d}", "\n".join(paragraphs[start : start + 100]) + "\n"
        )
