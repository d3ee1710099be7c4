"""Releases, downloads, links and records of runs state what is so."""

import json
import urllib.error
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.toy_chapter import TOY
from tools import downloads, facts, links, print_book, record_runs, release
from tools.chapters import ROOT, Result, form

CHANGELOG = "# Changelog\n\n## 0.2.0\n\n- New.\n\n## 0.1.0\n\n- First.\n- Second.\n"


def test_notes_are_the_versions_own_part() -> None:
    assert release.notes(CHANGELOG, "0.1.0") == "- First.\n- Second.\n"
    assert release.notes(CHANGELOG, "0.2.0") == "- New.\n"
    for version in ("0.3.0", "0.1"):
        with pytest.raises(SystemExit, match=f"nothing under `## {version}`"):
            release.notes(CHANGELOG, version)


def test_a_tag_of_another_version_is_refused_and_this_one_needs_all_its_notes(monkeypatch) -> None:
    known = facts.read()
    assert release.notes((ROOT / "CHANGELOG.md").read_text(), known.version)
    changelog = f"# Changelog\n\n## Unreleased\n\n## {known.version}: all of it\n\n- New.\n"
    monkeypatch.setattr(facts, "stale_files", dict)
    monkeypatch.setattr(facts, "read", lambda: replace(known, published=True))
    release.check(f"v{known.version}", changelog)
    release.check(f"v{known.version}", changelog.replace("## Unreleased\n\n", ""))
    with pytest.raises(SystemExit, match=f"should be v{known.version}"):
        release.check("v9.9.9", changelog)
    for heading in ("## Unreleased", "## Unreleased: the next edition"):
        waiting = changelog.replace("## Unreleased", f"{heading}\n\n### Fixed\n- Newer.")
        with pytest.raises(SystemExit, match="under `## Unreleased` is not in the notes"):
            release.check(f"v{known.version}", waiting)
    monkeypatch.setattr(facts, "read", lambda: replace(known, published=False))
    with pytest.raises(SystemExit, match="set `published = true`"):
        release.check(f"v{known.version}", changelog)


def test_the_archive_holds_every_notebook_and_is_the_same_each_time(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(downloads, "pdf_path", lambda: tmp_path / "book.pdf")
    (archive,) = downloads.collect(tmp_path / "one")
    names = zipfile.ZipFile(archive).namelist()
    assert names == [
        f"notebooks/{path.name}" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
    ]
    (tmp_path / "book.pdf").write_bytes(b"%PDF")
    again, pdf = downloads.collect(tmp_path / "two")
    assert again.read_bytes() == archive.read_bytes() and pdf.read_bytes() == b"%PDF"


def test_printing_needs_a_staged_book(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(print_book, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="run `make book` first"):
        print_book.print_book()


def test_an_address_that_is_gone_is_told_from_one_that_is_shy(monkeypatch) -> None:
    def answer(request, timeout: float):
        code = int(request.full_url.rsplit("/", 1)[1])
        raise urllib.error.HTTPError(request.full_url, code, "words", None, None)

    monkeypatch.setattr(links.urllib.request, "urlopen", answer)
    assert links.trouble("https://example.org/403") is None
    assert links.trouble("https://example.org/404") == "404 words"
    assert links.trouble("https://example.org/500") == "500 words"


def test_addresses_of_prose_are_found_without_what_follows_them() -> None:
    found = links.addresses()
    assert "https://arxiv.org/abs/2106.09685" in found
    assert not [address for address in found if address.endswith((".", ",", ")", "`"))]


def test_the_projects_own_addresses_are_left_out_until_something_answers(
    monkeypatch, capsys
) -> None:
    known = facts.read()
    elsewhere = "https://arxiv.org/abs/2106.09685"
    own = [known.url, f"{known.book}/book/setup.html", f"https://colab.research.google.com/github/{known.slug}/blob/main/a.ipynb"]  # fmt: skip
    gone = (known.slug, known.book)
    monkeypatch.setattr(links, "addresses", lambda: dict.fromkeys([*own, elsewhere], "a.md"))
    monkeypatch.setattr(links, "trouble", lambda a: "404 Not Found" if any(part in a for part in gone) else None)  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        links.main()
    assert not ended.value.code and "1 addresses, 0 gone" in capsys.readouterr().out
    monkeypatch.setattr(links, "trouble", lambda a: "404 Not Found" if a == own[1] else None)
    with pytest.raises(SystemExit) as ended:  # the book is there, and a page of it is not
        links.main()
    assert ended.value.code and f"a.md: {own[1]}: 404 Not Found" in capsys.readouterr().out
    monkeypatch.setattr(facts, "read", lambda: replace(known, published=True))
    monkeypatch.setattr(links, "trouble", lambda a: "404 Not Found" if any(part in a for part in gone) else None)  # fmt: skip
    with pytest.raises(SystemExit) as ended:  # once published nothing of it is a placeholder
        links.main()
    assert ended.value.code and "3 gone" in capsys.readouterr().out


def test_a_record_keeps_what_was_measured_on_the_same_device_only(tmp_path, monkeypatch) -> None:
    path = tmp_path / "t4.json"
    monkeypatch.setattr(record_runs, "device", lambda profile: "a T4")
    record_runs.record("t4", {"1_1": {"minutes": 3}}, path)
    record_runs.record("t4", {"0_1": {"minutes": 2}}, path)
    assert list(json.loads(path.read_text())["chapters"]) == ["0_1", "1_1"]
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"date": "2026-01-02"}))
    record_runs.record("t4", {"0_1": {"minutes": 2}}, path)
    assert json.loads(path.read_text())["chapters"]["1_1"]["date"] == kept["date"]  # its own day
    monkeypatch.setattr(record_runs, "device", lambda profile: "an L4")
    record_runs.record("t4", {"0_1": {"minutes": 1}}, path)
    record = json.loads(path.read_text())
    assert record["chapters"] == {"0_1": {"minutes": 1}} and record["device"] == "an L4"


def test_an_entry_counts_minutes_claims_and_peak(tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    claims = {"claims": [{"holds": True}, {"holds": False}]}
    (tmp_path / "claims" / "0_1.json").write_text(json.dumps(claims))
    result = Result("0_1", tmp_path, seconds=90.0, fresh=True)
    assert record_runs.entry(result, 2048, form="a1") == {
        "form": "a1",
        "minutes": 1.5,
        "claims": 2,
        "hold": 1,
        "peak_gib": 2,
    }
    assert "peak_gib" not in record_runs.entry(result, None, form="a1")
    assert record_runs.entry(result, None, on_gpu=False, form="a1") == {
        "form": "a1",
        "minutes": 1.5,
    }


def test_the_book_shows_records_and_says_where_there_are_none(tmp_path: Path) -> None:
    folder = tmp_path / "lora_course" / "data" / "runs"
    assert "No run on a GPU is recorded yet" in record_runs.table(tmp_path)
    folder.mkdir(parents=True)
    chapter = tmp_path / "notebooks" / "0_1.md"
    chapter.parent.mkdir()
    chapter.write_text(TOY)
    run = {"form": form(chapter), "minutes": 2.5, "claims": 9, "hold": 8, "peak_gib": 3.25}
    record = {"profile": "t4", "device": "a T4", "date": "2026-01-02", "versions": {"torch": "2.11"}, "chapters": {"0_1": run}}  # fmt: skip
    (folder / "t4.json").write_text(json.dumps(record))
    shown = record_runs.table(tmp_path)
    assert "`t4` on a T4, 2026-01-02 (torch 2.11)" in shown and "guesses" not in shown
    assert "| 0_1 | 2.5 | 3.2 GiB | 8 of 9 |" in shown
    chapter.write_text(TOY.replace("sparse.ANSWER", "sparse.QUESTION"))
    assert "| 0_1 (an earlier form) | 2.5 |" in record_runs.table(tmp_path)
    kept = record | {"chapters": {"0_1": run | {"date": "2020-01-01"}}}  # from an earlier recording
    (folder / "t4.json").write_text(json.dumps(kept))
    assert "| 0_1 (an earlier form, 2020-01-01) | 2.5 |" in record_runs.table(tmp_path)
    cpu = record | {"profile": "tiny", "device": "2 CPUs", "chapters": {"0_1": {"form": form(chapter), "minutes": 2.5}, "1_1": {"minutes": 3.0}}}  # fmt: skip
    (folder / "tiny.json").write_text(json.dumps(cpu))
    assert "`tiny` on 2 CPUs, 2026-01-02 (torch 2.11): 6 minutes" in record_runs.table(tmp_path)
    assert "one after another; 1 of them in an earlier form." in record_runs.table(tmp_path)
