"""The project's facts: stated in pyproject.toml, written everywhere else, and nothing to click before it is published."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from tools import crosslinks, facts, launch
from tools.chapters import ROOT

CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
REPOSITORY, BOOK = "https://github.com/someone/elsewhere", "https://someone.github.io/elsewhere"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("README.md", "CONTRIBUTING.md", "_config.yml", "CITATION.cff", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("book", "notebooks", "lora_course/lab"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("_*"))
    return tmp_path


def state(root: Path, *changes: tuple[str, str]) -> None:
    """Changes pyproject.toml; each old part has to be there."""
    text = (root / "pyproject.toml").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (root / "pyproject.toml").write_text(text)


def publish(root: Path, published: bool) -> dict[Path, str]:
    """What `make facts` writes, written; the texts of all files that state a fact."""
    stated = re.sub(r"^published = \w+$", f"published = {str(published).lower()}", (root / "pyproject.toml").read_text(), flags=re.MULTILINE)  # fmt: skip
    (root / "pyproject.toml").write_text(stated)
    for path, text in facts.stale_files(root).items():
        path.write_text(text)
    assert not facts.stale_files(root), "a second run changes nothing"
    return {path.relative_to(root).as_posix(): path.read_text() for path in facts.updated(root)}


def moved(root: Path, repository: str = REPOSITORY, book: str = BOOK) -> None:
    known = facts.read()
    state(root, (f'"{known.url}"', f'"{repository}"'), (f'"{known.book}"', f'"{book}"'))


def test_a_new_address_and_version_reach_every_file_that_states_them(copy: Path) -> None:
    old = facts.read()
    moved(copy)
    state(copy, (f'"{old.version}"', '"9.8.7"'))
    new = publish(copy, True)
    assert not [name for name, text in new.items() if old.slug in text or old.book in text]
    for name in ("CITATION.cff", "README.md", "_config.yml"):
        assert "9.8.7" in new[name]
    assert f'BOOK = "{BOOK}"' in new[facts.CLAIMS]
    for chapter in (copy / "notebooks").glob("*.md"):
        text = new[f"notebooks/{chapter.name}"]
        assert f"({BOOK}/_sources/notebooks/{chapter.stem}.ipynb)" in text
        assert f"https://colab.research.google.com/github/someone/elsewhere/blob/main/notebooks/{chapter.stem}.ipynb" in text  # fmt: skip
    assert f"git clone {REPOSITORY}\ncd elsewhere\n" in new["book/setup.md"]


def test_the_set_up_page_enters_the_folder_that_its_clone_makes() -> None:
    text = (ROOT / "book" / "setup.md").read_text()
    assert re.search(r"^git clone .*\ncd (.*)$", text, re.MULTILINE)[1] == facts.read().slug.split("/")[1]  # fmt: skip
    assert "(`Repository` and `Documentation`)" in text


@pytest.mark.parametrize(
    ("repository", "book", "said"),
    [
        (REPOSITORY, None, BOOK),
        (REPOSITORY, "https://someone.github.io/another", BOOK),
        (f"{REPOSITORY}.git", BOOK, "without .git"),
    ],
    ids=["the repository alone", "another repository's pages", "an address to clone"],
)
def test_addresses_that_do_not_belong_together_are_refused(copy, repository, book, said) -> None:
    moved(copy, repository, book or facts.read().book)
    with pytest.raises(SystemExit, match=re.escape(said)):
        facts.read(copy)


@pytest.mark.parametrize(
    ("repository", "book"),
    [
        (REPOSITORY, f"{BOOK}/"),
        ("https://github.com/Someone/elsewhere", BOOK),
        ("https://github.com/someone/someone.github.io", "https://someone.github.io"),
        (REPOSITORY, "https://lora.example.org/book"),
    ],
)
def test_addresses_that_belong_together_are_taken(copy, repository, book) -> None:
    moved(copy, repository, book)
    assert facts.read(copy).book == book.rstrip("/")


@pytest.mark.parametrize("line", ["", 'published = "no"'])
def test_whether_it_is_published_has_to_be_said(copy: Path, line: str) -> None:
    old = re.search(r"^published = .*$", (copy / "pyproject.toml").read_text(), re.MULTILINE)[0]
    state(copy, (old, line))
    with pytest.raises(SystemExit, match="expected true or false"):
        facts.read(copy)


def offered(text: str) -> str:
    """What a page offers outside of code, and the commands that name an address without a mark."""

    def unmarked(code: re.Match[str]) -> str:
        lines = code[0].splitlines() if code[0].startswith("```bash") else ()
        return "\n".join(line for line in lines if launch.MARK not in line)

    return CODE.sub(unmarked, text)


def test_nothing_can_be_clicked_that_is_not_there_yet(copy: Path) -> None:
    known, texts = facts.read(), publish(copy, False)
    pages = {name: text for name, text in texts.items() if name.endswith(".md")}
    assert len(pages) > 20 and not [name for name, text in pages.items() if re.search(f"{known.slug}|{known.book}", offered(text))]  # fmt: skip
    assert texts["book/setup.md"].count(launch.MARK) == 2
    how = "[Not published yet: how to launch from a copy]"
    for name, text in pages.items():
        if name.startswith("notebooks/"):
            title = text.partition("\n# ")[2]
            assert title.split("\n\n")[1] == f"{how}(../book/setup.md#from-a-copy)"
            cells = crosslinks.for_notebook(CODE.sub("", text), Path(name).stem, None)
            assert known.slug not in cells and known.book not in cells and how in cells
            assert "github.com/YOU/" in text and f"install git+{known.url}" not in text
    assert pages["README.md"].count(f"{how}(book/setup.md#from-a-copy)") == 1
    for name in ("README.md", "book/intro.md"):
        assert "actions/workflows" not in pages[name] and "under its title" not in pages[name]
    settings = yaml.safe_load(texts["_config.yml"])
    assert "launch_buttons" not in settings
    assert not settings["html"]["use_repository_button"] and not settings["html"]["use_issues_button"]  # fmt: skip


def test_once_it_is_published_every_page_leads_there(copy: Path) -> None:
    known, texts = facts.read(), publish(copy, True)
    assert not [name for name, text in texts.items() if "ot published yet" in text.replace("isn't published yet, or", "") and name != "CONTRIBUTING.md"]  # fmt: skip
    for name, text in texts.items():
        if name.startswith("notebooks/"):
            badges = re.search(r"^\[Open in Colab\].*$", text, re.MULTILINE)[0]
            assert badges.count(f"{known.slug}/blob/main/{name.removesuffix('.md')}.") == 3
            assert f"({known.book}/_sources/{name.removesuffix('.md')}.ipynb)" in badges
            assert "/YOU/" not in text and f"install git+{known.url}" in text
    assert f"[![CI]({known.url}/actions/workflows/ci.yml/badge.svg)]" in texts["README.md"]
    assert f"({known.url}/releases)" in texts["README.md"]
    settings = yaml.safe_load(texts["_config.yml"])
    assert settings["launch_buttons"] == {"colab_url": "https://colab.research.google.com"}
    assert settings["html"]["use_repository_button"] and settings["html"]["use_issues_button"]


def test_either_form_is_written_over_the_other(copy: Path) -> None:
    first = publish(copy, False)
    then = publish(copy, True)
    changed = {name for name in first if first[name] != then[name]}
    assert {"README.md", "_config.yml", "book/intro.md", "book/setup.md"} <= changed
    assert {name for name in first if name.startswith("notebooks/")} <= changed
    assert publish(copy, False) == first and publish(copy, True) == then
