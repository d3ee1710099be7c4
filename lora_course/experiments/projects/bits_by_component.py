"""The project of chapter 4.3: the first components of a trained adapter in 4 bits and the others in 2, against 3 bits for all.

The adapters are plain LoRA's of the chapter's study, rank 8, trained again at its rate and with its first three seeds; grid, groups and
scoring are the study's. A mixed adapter is written as two files, one for each width. "bytes" are theirs, headers included, and
"payload" without. "error" is ‖ΔW − ΔW before‖ / ‖ΔW before‖ over all layers together.

    3 bits           one width for all components        "…, rotated": after the components were made those of an SVD,
    h = 4, h = 2     the first h in 4 bits               largest first, with the root of each singular value on both sides

Expected, before the first run. Rotated, h = 4 has a smaller error than 3 bits rotated. Not rotated, it has a larger one than 3 bits,
since the order means nothing then and 2 bits lose more than 4 bits save. Rotating alone makes the error of 3 bits smaller. In bits a
byte h = 4, rotated, is within noise of 3 bits, rotated: there is almost nothing to win.
"""

from __future__ import annotations

import tempfile
from functools import cache
from typing import Any

from lora_course.experiments import ROUNDING, Runs, Study, Witness, adapted, config_of, quantized
from lora_course.experiments.arms import components
from lora_course.experiments.rates import run_key
from lora_course.lora import AdapterState
from lora_course.quantized import quantize_after_training, save_quantized
from lora_course.states import concatenate, factor_state, relative_error, truncate, use_adapter

R, RATE = quantized.SETTINGS["r"], 8e-3
ARMS: dict[str, list[tuple[int, int]]] = {"3 bits": [(R, 3)], "h = 4": [(4, 4), (4, 2)], "h = 2": [(2, 4), (6, 2)]}  # fmt: skip
SETTINGS: dict[str, Any] = {
    key: quantized.SETTINGS[key]
    for key in ("model", "domain", "steps", "batch", "length", "r", "scaling", "train_bytes", "score_bytes", "group_size")
} | {"seeds": [0, 1, 2], "rate": RATE, "components and bits": ARMS}  # fmt: skip


@cache
def trained(seed: int) -> AdapterState:
    return factor_state(quantized.trained("lora", RATE, seed).model)


def written(model: Any) -> tuple[int, int]:
    """Bytes of the file, and of its tensors alone."""
    with tempfile.TemporaryDirectory() as folder:
        file = save_quantized(model, folder).read_bytes()
    header = 8 + int.from_bytes(
        file[:8], "little"
    )  # a safetensors file begins with its header's length
    return len(file), len(file) - header


def few_bits(seed: int, parts: list[tuple[int, int]], rotated: bool) -> dict[str, Any]:
    before = trained(seed)
    state, start = truncate(before, R) if rotated else before, 0
    rounded, size, payload = [], 0, 0
    for count, bits in parts:
        model = adapted(SETTINGS, 0, config_of(count, SETTINGS["scaling"]))
        use_adapter(model, components(state, start, count))
        quantize_after_training(model, bits=bits, group_size=SETTINGS["group_size"])
        rounded.append(factor_state(model))
        size, payload = size + written(model)[0], payload + written(model)[1]
        start += count
    after = concatenate(rounded)
    model = use_adapter(adapted(SETTINGS, 0, config_of(R, SETTINGS["scaling"])), after)
    bits_per_byte = quantized.bits_of(SETTINGS, model, "test")
    found = {"bits_per_byte": bits_per_byte, "error": relative_error(after, before)}
    return found | {"bytes": size, "payload": payload}


def body(runs: Runs) -> None:
    runs.expect(2 * len(ARMS) * len(runs.seeds))
    for seed in runs.seeds:
        for arm, parts in ARMS.items():
            for rotated in (False, True):
                name = f"{arm}, rotated" if rotated else arm
                runs(run_key(name, RATE, seed, "test"), few_bits, seed, parts, rotated)


WITNESS = Witness(
    ("h = 4, rotated/0.008/0/test",),
    {"bits_per_byte": 0.005, "error": 0.01, "bytes": 128},
    ROUNDING + "; the header of each file names more than it did",
)
STUDY = Study("4_3_project", SETTINGS, body, WITNESS)
