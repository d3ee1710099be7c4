"""Trains and scores what the page that plays holds: adapters of nano, and a router over four of them.

    python -m tools.playpage         about 45 minutes of one thread; goes on where it was stopped

Writes into book/_data/play: an adapter a file (`<module>.A` and `<module>.B` in bf16, scaling 1) and record.json, which holds
settings, versions and every number that the page quotes. `tools.playpage.pack` turns the files into what a browser loads.

A plain adapter is written with its factors sorted by singular value (`truncate` at its own rank), so that its first k rows
and columns are its best cut to rank k. Of one domain the factors as trained are written too, and a nested adapter, which was
trained to be sliced. Scores are of the rounded files, on test text.
"""

from tools.playpage.record import FOLDER, RECORD, Record
from tools.playpage.score import score_all, write_samples
from tools.playpage.train import train_all, train_tasks

FOLDER.mkdir(parents=True, exist_ok=True)
record = Record(RECORD)
write_samples()
train_all(record)
score_all(record)
train_tasks(record)
print("finished", flush=True)
