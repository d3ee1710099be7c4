"""A pytest plugin (`-p tools.nbmake_progress`): says which cell of a notebook nbmake is executing, and how long it took.

Progress goes to stderr, and to the file named by LORA_COURSE_PROGRESS, which outlives a kernel that is killed.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import nbmake.nb_run
from nbclient import NotebookClient
from nbformat import NotebookNode

REPORTED_SECONDS = 2.0  # faster cells are counted, not listed
TERMINAL = os.fdopen(os.dup(2), "w", buffering=1)  # stderr as it is before pytest captures it


class ReportingClient(NotebookClient):
    """nbclient's notebook client, with a line for each cell that takes its time."""

    async def async_execute_cell(
        self, cell: NotebookNode, cell_index: int, *args: Any, **kwargs: Any
    ) -> NotebookNode:
        if cell.cell_type != "code" or "skip-execution" in cell.metadata.get("tags", []):
            return await super().async_execute_cell(cell, cell_index, *args, **kwargs)
        number = sum(c.cell_type == "code" for c in self.nb.cells[: cell_index + 1])
        total = sum(c.cell_type == "code" for c in self.nb.cells)
        first = next((line.strip() for line in cell.source.splitlines() if line.strip()), "")[:60]
        Path(os.environ["LORA_COURSE_PROGRESS"]).write_text(json.dumps({"index": cell_index}))
        live = TERMINAL.isatty()
        if live:
            print(f"\r\x1b[K  cell {number}/{total}  {first}", end="", file=TERMINAL, flush=True)
        start = time.perf_counter()
        try:
            return await super().async_execute_cell(cell, cell_index, *args, **kwargs)
        finally:
            seconds = time.perf_counter() - start
            clear = "\r\x1b[K" if live else ""
            if seconds >= REPORTED_SECONDS or number == total:
                print(
                    f"{clear}  cell {number}/{total}  {seconds:6.1f} s  {first}",
                    file=TERMINAL,
                    flush=True,
                )


nbmake.nb_run.NotebookClient = ReportingClient
