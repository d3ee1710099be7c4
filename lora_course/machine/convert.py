"""`lora-course convert`: an adapter from the course's format to PEFT's, or the other way. No weight of the base is read."""

from __future__ import annotations

from pathlib import Path

from lora_course.checkpoint import load_adapter, read_description, save_adapter
from lora_course.export import export_peft, load_peft
from lora_course.lab import describe_base


def convert(source: Path, target: Path, base: str, uniform: bool = False) -> str:
    """Write the adapter in `source` to `target` in the other format; its name is returned.

    base: what the adapter belongs to, of which names and shapes are needed alone.    uniform: see `export_peft`.
    Raises ValueError, before any work, for a source of neither or both formats and for a target that is not empty.
    """
    ours, pefts = (source / "adapter.json").is_file(), (source / "adapter_config.json").is_file()
    if ours == pefts:
        raise ValueError(
            f"{source} holds {'both' if ours else 'neither'} adapter.json (the course's format) {'and' if ours else 'nor'} adapter_config.json (PEFT's)."
        )
    if uniform and not ours:
        raise ValueError(
            "--uniform is of what is written for PEFT and servers: SOURCE holds PEFT's format already."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"{target} is there already: give a folder that is empty or does not exist."
        )
    model = describe_base(base)
    if not ours:
        save_adapter(load_peft(model, source), target)
        return "the course's"
    name = read_description(source)["base"]["name"] or None
    export_peft(load_adapter(model, source), target, uniform, name)
    return "PEFT's"
