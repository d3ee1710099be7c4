"""`tools.compare_outputs`: what a chapter says is compared, what a machine adds is not."""

import os
from pathlib import Path

import nbformat

from tools.compare_outputs import compare, main

V4 = nbformat.v4


def written(path: Path, *cells: tuple[str, list]) -> Path:
    code = [V4.new_code_cell(source, outputs=outputs) for source, outputs in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(V4.new_notebook(cells=code), path)
    return path


def printed(text: str, name: str = "stdout") -> nbformat.NotebookNode:
    return V4.new_output("stream", name=name, text=text)


def table(html: str) -> nbformat.NotebookNode:
    return V4.new_output("display_data", {"text/html": html, "text/plain": "<a table>"})


def test_times_and_free_memory_are_left_out_and_a_number_is_not(tmp_path: Path) -> None:
    before = written(
        tmp_path / "a" / "c.ipynb",
        ("one", [printed("bits 1.234, in 12.5 s; free: 3.1 GiB"), printed("50%", "stderr")]),
        ("two", [table("<p>r = 8</p><p>same</p>")]),
    )
    same = written(
        tmp_path / "b" / "c.ipynb",
        ("one", [printed("bits 1.234, in 8 s; free: 7.9 GiB")]),
        ("new", [printed("and more")]),
        ("two", [table("<p>r = 8</p><p>same</p>")]),
    )
    assert compare(before, same) == (2, [])
    other = written(
        tmp_path / "d" / "c.ipynb",
        ("one", [printed("bits 1.235, in 12.5 s; free: 3.1 GiB")]),
        ("two", [table("<p>r = 4</p><p>same</p>")]),
    )
    count, found = compare(before, other)
    said = [line.strip() for line in found if line.strip()[0] in "+-"]
    assert count == 2 and said[1::2] == ["+bits 1.235, in … s; free: … GiB", "+r = 4"]
    assert [line for line in found if line[2] != " "] == ["  one", "  two"]


def test_the_latest_of_each_chapter_counts_and_a_difference_is_a_failure(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    written(old / "c-1" / "c.ipynb", ("x", [printed("1")]))
    first = written(new / "c-1" / "c.ipynb", ("x", [printed("2")]))
    assert main(str(old), str(old)) == set() and main(str(old), str(new)) == {"c"}
    os.utime(first, (0, 0))
    written(new / "c-2" / "c.ipynb", ("x", [printed("1")]))
    assert main(str(old), str(new)) == set()
    written(new / "e-1" / "e.ipynb", ("x", []))
    assert main(str(old), str(new)) == {"e"}
