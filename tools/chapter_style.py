"""What can be measured of a chapter's style, in its source.

python -m tools.chapter_style [STEM ...]    a line a chapter: words, code, widths, minutes
"""

import argparse
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jupytext
from nbformat import NotebookNode

from tools.chapters import chapters
from tools.crosslinks import LINK

FOLDED = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
COLUMNS, CELL, WORDS = 88, 15, 3200  # a line, a cell's lines, a chapter's words: at most
ORDER = (  # sections of a chapter of the second edition; others may stand between them
    "When you need it", "Use it", "The idea", "Build it", "The sketch", "Check it", "Train it",
    "Claims", "Exercises",
)  # fmt: skip
WORDS_A_MINUTE, SECONDS_A_LINE = 200, 4  # prose as one reads it to understand; code, line by line
MINUTES = re.compile(r"^\*\*Exercise [^\n]*?\(\w+, (\d+) minutes?\)", re.MULTILINE)
EXERCISES = re.compile(r"^## Exercises$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
SELF_TEST = re.compile(r"^## Self-test$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
QUESTIONS = re.compile(
    r"^<details><summary>(?:<b>)?Before you [^\n]*</summary>$.*?^</details>$",
    re.MULTILINE | re.DOTALL,
)
FENCED = re.compile(r"^```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
ANSWERS = re.compile(r"^<details><summary>\d\. ", re.MULTILINE)
TIME = re.compile(r"\*\*Time\*\*: (\d+) minutes to read, (\d+) for the exercises")


@dataclass(frozen=True)
class Chapter:
    """A chapter's source, as a reader of the page sees it: folded cells don't count as code that is seen."""

    path: Path

    @cached_property
    def cells(self) -> list[NotebookNode]:
        return jupytext.read(self.path).cells

    @cached_property
    def prose(self) -> str:
        return "\n\n".join(c.source for c in self.cells if c.cell_type == "markdown")

    @cached_property
    def visible(self) -> list[list[str]]:
        """The lines of each cell that is not folded, without blank ones."""
        seen = [
            cell.source.splitlines()
            for cell in self.cells
            if cell.cell_type == "code" and not FOLDED & set(cell.metadata.get("tags", []))
        ]
        return [[line for line in lines if line.strip()] for lines in seen]

    @property
    def words(self) -> int:
        """Words of prose without the exercises, which have minutes of their own; a formula, an address and a code span are none."""
        read = EXERCISES.sub("", self.prose)
        return len(re.sub(r"\$[^$]*\$|`[^`]*`|(?<=\])\([^)]*\)", " ", read).split())

    @property
    def recall(self) -> tuple[int, int, int]:
        """Questions before a look, questions of the self-test, and bugs to find."""
        answers = "".join(SELF_TEST.findall(self.prose))
        bugs = self.prose.count("\n**Find the bug**")
        return len(QUESTIONS.findall(self.prose)), len(ANSWERS.findall(answers)), bugs

    @property
    def wide(self) -> list[str]:
        """Lines of code that scroll on a laptop, of cells and of recipes within the text."""
        recipes = [block.splitlines() for block in FENCED.findall(self.prose)]
        return [line for lines in self.visible + recipes for line in lines if len(line) > COLUMNS]

    @property
    def long(self) -> list[str]:
        """The first line of each visible cell that is longer than a thought."""
        return [lines[0] for lines in self.visible if len(lines) > CELL]

    @property
    def headings(self) -> list[str]:
        return re.findall(r"^## (.+)$", self.prose, re.MULTILINE)

    @property
    def claims(self) -> set[str]:
        """Ids of the claims that the chapter states, wherever its cells state them."""
        code = "\n".join(c.source for c in self.cells if c.cell_type == "code")
        number = ".".join(self.path.stem.split("_")[:2])
        called = re.findall(r"claims\.add\(\s*(?:id=)?[\"']([^\"']+)[\"']", code)
        return {id for id in called if id.startswith(f"{number}-")}

    @property
    def linked(self) -> set[str]:
        """Anchors on its own page that the prose links to."""
        addresses = [address for _, address in LINK.findall(self.prose)]
        return {address[1:] for address in addresses if address.startswith("#")}

    @property
    def figures(self) -> list[int]:
        """Places in the chapter of its numbered figures, in order."""
        code = "\n".join(c.source for c in self.cells if c.cell_type == "code")
        number = re.escape(".".join(self.path.stem.split("_")[:2]))
        return [int(n) for n in re.findall(rf"number=[\"']{number}-(\d+)[\"']", code)]

    @property
    def minutes(self) -> tuple[int, int]:
        """Minutes to read, by the rule above, in steps of five; minutes of the exercises, as they state them."""
        lines = sum(map(len, self.visible))
        reading = self.words / WORDS_A_MINUTE + lines * SECONDS_A_LINE / 60
        return 5 * math.ceil(reading / 5), sum(map(int, MINUTES.findall(self.prose)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stems", nargs="*", metavar="STEM")
    wanted = parser.parse_args().stems
    for path in chapters():
        if not wanted or path.stem in wanted:
            chapter = Chapter(path)
            lines = sum(map(len, chapter.visible))
            print(
                f"{path.stem:18} {chapter.words:5} words, {lines:4} lines seen, {len(chapter.wide):3} wide, "
                f"{len(chapter.long):2} long cells; %d minutes to read, %d for the exercises"
                % chapter.minutes
            )


if __name__ == "__main__":
    main()
