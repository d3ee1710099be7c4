"""Runs chapters under a profile and records what they took on this machine, which preflight reads and the book shows.

    LORA_COURSE_PROFILE=t4 python -m tools.record_runs [STEM ...]

Writes lora_course/data/runs/<profile>.json: device, date, versions, and by chapter its form (a hash of its code), minutes,
the GPU's peak memory and how many claims hold. Chapters that are not run keep what was recorded of them on the same device.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import threading
from pathlib import Path

from tools import run_chapters
from tools.chapters import ROOT, form, forms

RUNS = ROOT / "lora_course" / "data" / "runs"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


class GpuPeak(threading.Thread):
    """The largest memory in use on the GPU while it runs, in MiB, asked of nvidia-smi once a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stopped, self.peak = threading.Event(), 0

    def run(self) -> None:
        command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self.stopped.wait(1):
            used = subprocess.run(command, capture_output=True, text=True).stdout.split()
            self.peak = max([self.peak, *map(int, used)])


def device(profile: str) -> str:
    """The GPU's name, or the CPU's kind and how many."""
    if profile in run_chapters.GPU_PROFILES:
        import torch

        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPUs ({platform.machine()})"


def entry(
    result: run_chapters.Result, peak_mib: int | None, on_gpu: bool = True, *, form: str
) -> dict:
    """What a record keeps of a chapter. What it claims on a CPU is the book's own, so minutes alone are kept of that."""
    found = {"form": form, "minutes": round(result.seconds / 60, 2)}
    if not on_gpu:
        return found
    claims = [claim for path in result.claims for claim in json.loads(path.read_text())["claims"]]
    found |= {"claims": len(claims), "hold": sum(claim["holds"] for claim in claims)}
    return found | ({} if peak_mib is None else {"peak_gib": round(peak_mib / 1024, 2)})


def record(profile: str, chapters: dict[str, dict], path: Path | None = None) -> Path:
    """Writes what was measured beside what was recorded on the same device before."""
    path = path or RUNS / f"{profile}.json"
    here = device(profile)
    old = json.loads(path.read_text()) if path.exists() else {}
    kept = old.get("chapters", {}) if old.get("device") == here else {}
    kept = {stem: {"date": old["date"], **run} for stem, run in kept.items()}
    text = {
        "profile": profile,
        "device": here,
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}},
        "chapters": dict(sorted((kept | chapters).items())),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(text, indent=1) + "\n")
    return path


def table(root: Path = ROOT) -> str:
    """What chapters took on machines where somebody ran them: a table for each record in data/runs/."""
    records = sorted((root / "lora_course" / "data" / "runs").glob("*.json"))
    parts, now = [], json.loads(forms(root))
    for path in records:
        record = json.loads(path.read_text())
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        earlier = {
            stem for stem, run in record["chapters"].items() if run.get("form", "") != now.get(stem)
        }
        where = f"`{record['profile']}` on {record['device']}, {record['date']} ({versions})"
        if record["profile"] not in run_chapters.GPU_PROFILES:
            minutes = sum(run["minutes"] for run in record["chapters"].values())
            older = f"; {len(earlier)} of them in an earlier form" if earlier else ""
            parts.append(
                f"{where}: {minutes:.0f} minutes for all chapters, one after another{older}.\n"
            )
            continue
        parts.append(f"{where}:\n")
        parts.append(
            "| chapter | minutes | peak of the GPU's memory | claims that hold |\n|---|---|---|---|"
        )
        for stem, run in record["chapters"].items():
            peak = f"{run['peak_gib']:.1f} GiB" if "peak_gib" in run else "not counted"
            notes = ["an earlier form" if stem in earlier else "", run.get("date", "")]
            name = f"{stem} ({', '.join(filter(None, notes))})" if any(notes) else stem
            parts.append(
                f"| {name} | {run['minutes']:.1f} | {peak} | {run['hold']} of {run['claims']} |"
            )
        parts.append("")
    gpus = {"t4", "large"} & {path.stem for path in records}
    if not gpus:
        parts.append(
            "No run on a GPU is recorded yet: the minutes that chapters announce for `t4` and `large` are guesses."
        )
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stems", nargs="*", metavar="STEM")
    stems, profile = parser.parse_args().stems, run_chapters.profile()
    on_gpu = profile in run_chapters.GPU_PROFILES
    found, failed = {}, []
    for chapter in run_chapters.chapters():
        if stems and chapter.stem not in stems:
            continue
        watch = GpuPeak()
        if on_gpu:
            watch.start()
        try:
            result = run_chapters.execute(chapter)
            measured = on_gpu and result.fresh  # one from the cache used no GPU now
            found[chapter.stem] = entry(
                result, watch.peak if measured else None, on_gpu, form=form(chapter)
            )
        except run_chapters.ChapterFailed as failure:
            failed.append(chapter.stem)
            run_chapters.say(f"FAILED {failure}")
        finally:
            watch.stopped.set()
    if found:
        run_chapters.say(f"{record(profile, found).relative_to(ROOT)}: {len(found)} chapters")
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
