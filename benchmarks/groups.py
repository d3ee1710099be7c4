"""Which arms are measured together."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Group:
    """Arms that take turns. The first one is what the others are compared with. arms: label → (name, further arguments of
    `make`). memory: whether each arm's peak is measured too. rounds: times the rounds of its size."""

    size: str
    precision: str
    arms: dict[str, tuple[str, dict[str, int]]]
    memory: bool = False
    rounds: int = 1


def plain(*names: str) -> dict[str, tuple[str, dict[str, int]]]:
    return {name: (name, {}) for name in names}


VARIANTS = plain(
    "LoRA",
    "fused LoRA",
    "AdaLoRA",
    "progressive",
    "adaptive",
    "gates",
    "masked factors",
    "ΔW mask",
    "nested",
    "4-bit factors",
    "PEFT DoRA",
)


def groups(quick: bool = False) -> dict[str, Group]:
    """All parts of a run by name."""
    nano, smollm2 = ("quick", "quick") if quick else ("nano", "smollm2")
    found = {
        f"lora {label} {precision}": Group(size, precision, plain("PEFT LoRA", "LoRA", *["frozen base"] * (precision == "fp32")), memory=not quick or precision == "fp32" and label == "nano")
        for label, size in (("nano", nano), ("smollm2", smollm2)) for precision in ("fp32", "bf16", "4bit")
    }  # fmt: skip
    found |= {
        f"adalora {label}": Group(
            size,
            "fp32",
            plain("PEFT AdaLoRA", "AdaLoRA", "frozen base"),
            memory=not quick and size == smollm2,
        )
        for label, size in (("nano", nano), ("smollm2", smollm2))
    }
    found["experts smollm2"] = Group(smollm2, "fp32", plain("LoRA", "experts"), memory=not quick)
    found["xlora smollm2"] = Group(
        smollm2, "fp32", plain("X-LoRA", "frozen experts"), memory=not quick
    )
    found["merged smollm2"] = Group(
        smollm2, "fp32", plain("base", "merged and unloaded", "merged", "unmerged"), rounds=3
    )
    found |= {
        f"variants {label}": Group(size, "fp32", VARIANTS, memory=not quick and size == smollm2)
        for label, size in (("nano", nano), ("smollm2", smollm2))
    }
    ranks, counts = ((2, 4), (2,)) if quick else ((2, 8, 32, 128), (2, 4, 8, 16))
    found["curve rank"] = Group(
        nano,
        "fp32",
        {f"{name} {r}": (name, {"r": r}) for r in ranks for name in ("LoRA", "PEFT LoRA")},
    )
    found["curve experts"] = Group(
        nano,
        "fp32",
        {f"{name} {n}": (name, {"count": n}) for n in counts for name in ("experts",)}
        | plain("LoRA"),
    )
    found["curve tasks"] = Group(
        nano,
        "fp32",
        {
            f"{name} {n}": (name, {"count": n})
            for n in (1, *counts)
            for name in ("tasks", "PEFT tasks")
        },
    )
    return found
