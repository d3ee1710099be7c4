"""What was recorded, as the tables of the page."""

from __future__ import annotations

import json
from pathlib import Path

PLACES = ((0, -8), (0, 40), (2, -2))  # of a line's label: after which point, how far below it


def tables(root: Path, results: list) -> str:
    """What was recorded of the adapters that the page that plays holds."""
    record = json.loads((root / "book" / "_data" / "play" / "record.json").read_text())
    runs, settings = record["runs"], record["settings"]
    domains, cuts, cut = list(runs["scores/base"]), settings["cuts"], settings["cut_domain"]
    names = {"base": "nano alone", **{d: f"{d.title()} adapter" for d in settings["domains"]}}
    names |= {"routed": "all four, routed", "all averaged": "all four, averaged"}
    ways = {
        cut: "sorted (SVD)",
        "nested": "trained to be sliced",
        f"{cut}-as-trained": "rows as trained",
    }
    curves = {label: [runs[f"rank/{name}/{r}"] for r in cuts] for name, label in ways.items()}
    lines = [
        f"Each adapter: r = {settings['r']}, α = {settings['lora_alpha']}, all linear layers, {settings['steps']} steps of "
        f"{settings['batch']} × {settings['length']} tokens, AdamW at the better of two rates (on validation text), seed {settings['seed']}. "
        f"The router: {settings['router_steps']} steps on all four texts. One seed: these are observations, to go with what one sees. "
        f"Recorded on {record['date']} with torch {record['versions']['torch']} by `tools/playpage`; bits a byte, less is better.",
        "",
        f"On {settings['test_bytes'] // 1000} kB of test text a domain:",
        "",
        table(["", *(title(d) for d in domains)], [[names[k], *(f"{runs[f'scores/{k}'][d]:.2f}" for d in domains)] for k in names]),
        "",
        f"The {cut.title()} adapter on {settings['curve_bytes'] // 1000} kB of its own test text, cut to fewer components:",
        "",
        chart(curves, cuts, runs["scale/0"]),
        "",
        table(
            ["components", *map(str, cuts)],
            [[label, *(f"{bits:.3f}" for bits in curve)] for label, curve in curves.items()],
        ),
        "",
        "The same adapter scaled, and in fewer bits:",
        "",
        table(["scale", *(f"{s:g}" for s in settings["scales"])], [["bits a byte", *(f"{runs[f'scale/{s:g}']:.3f}" for s in settings["scales"])]]),
        "",
        table(
            ["bits", *map(str, settings["bits"])],
            [
                [f"{label}, one step for {per}", *(f"{runs[f'bits/{what}/{grid}/{b}']:.3f}" for b in settings["bits"])]
                for what, label in (("adapter", "adapter"), ("base", "nano under it"))
                for grid, per in (("tensor", "each matrix"), ("group", f"{settings['group_size']} numbers"))
            ],
        ),
        "",
        "Two adapters, half and half:",
        "",
        table(
            ["averaged", *(f"on {d.title()}" for d in settings["merged"])],
            [[how, *(f"{runs[f'merge/{how}/{d}']:.3f}" for d in settings["merged"])] for how in ("updates", "factors")],
        ),
    ]  # fmt: skip
    if recorded_tasks(record):
        lines += [
            "",
            f"Tasks, {settings['task_steps']} steps of {settings['task_batch']} words, on {settings['task_words']} words without a relative in training:",
            "",
            table(
                ["task", "right", "errors", "right without the adapter"],
                [
                    [f"`{t}`", *(f"{100 * runs[f'task/{t}'][k]:.0f}%" for k in ("exact", "error_rate")), f"{100 * runs[f'task/{t}/base']['exact']:.0f}%"]
                    for t in recorded_tasks(record)
                ],
            ),
        ]  # fmt: skip
    return "\n".join(lines)


def title(domain: str) -> str:
    return "WordNet" if domain == "glosses" else domain.title()


def tasks(root: Path, results: list) -> str:
    """The step that asks a task's adapter, once one is recorded; until then nothing."""
    folder = root / "book" / "_data" / "play"
    record = json.loads((folder / "record.json").read_text())
    return (folder / "task.md").read_text() if recorded_tasks(record) else ""


def recorded_tasks(record: dict) -> list[str]:
    return [task for task in record["settings"]["tasks"] if f"task/{task}/base" in record["runs"]]


def chart(lines: dict[str, list[float]], ranks: list[int], alone: float) -> str:
    """Bits a byte over the rank (log scale), a line a way to cut; labels stand beside the lines, so that no colour is needed."""
    low, high = min(min(line) for line in lines.values()) - 0.05, alone + 0.05
    x = {rank: 60 + 380 * i / (len(ranks) - 1) for i, rank in enumerate(ranks)}

    def y(bits: float) -> float:
        return 20 + 220 * (high - bits) / (high - low)

    parts = [f'<line x1="60" x2="440" y1="{y(alone):.1f}" y2="{y(alone):.1f}" class="alone"/>',
             f'<text x="440" y="{y(alone) - 7:.1f}" class="value">nano alone</text>']  # fmt: skip
    parts += [f'<text x="{x[rank]:.0f}" y="265" class="tick">{rank}</text>' for rank in ranks]
    steps = [round(low + (high - low) * i / 4, 1) for i in range(1, 4)]
    parts += [f'<text x="50" y="{y(bits) + 4:.1f}" class="value">{bits}</text>' for bits in steps]
    for number, (label, line) in enumerate(lines.items()):
        points = [f"{x[rank]:.1f},{y(bits):.1f}" for rank, bits in zip(ranks, line, strict=True)]
        parts.append(f'<polyline points="{" ".join(points)}" class="line-{number}"/>')
        parts += [
            f'<circle cx="{point.split(",")[0]}" cy="{point.split(",")[1]}" r="4" class="line-{number}"/>'
            for point in points
        ]
        at, down = PLACES[number]
        parts.append(
            f'<text x="{x[ranks[at]] + 10:.0f}" y="{y(line[at]) + down:.1f}">{label}</text>'
        )
    said = "; ".join(f"{label}: {line[0]:.2f} at rank {ranks[0]}" for label, line in lines.items())
    return (
        f'```{{raw}} html\n<figure class="play-chart"><svg viewBox="0 0 460 290" role="img" aria-label="Bits a byte over the rank. {said}.">'
        f'{"".join(parts)}<text x="250" y="285" class="tick">components that are kept</text></svg></figure>\n```'
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
