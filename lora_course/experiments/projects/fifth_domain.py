"""The project of chapter 2.1, "a fifth domain": a mixture of three experts reads a text that none of them was trained on.

Milton's expert is left out of the study `2_1_experts`, whose rows, steps and scoring hold here too; the other three are its
experts, trained again from the same seeds at its rate, which was the best for each of the three alone. Milton's own expert,
the ceiling, is in that study's record. Routers are trained on the text of the three:

    token       one gate a token, that study's steps        longer      the same for three times the steps
    sequence    one gate a sequence, that study's steps; the sixteen tokens that it looks at get equal gates

Each searches its own rate on the validation text of the three domains. Of the single experts the one that is best on
Milton's validation text is what the mixtures are compared with, "each" holds all of them.

Written before the run. Predictions: Milton's tokens go to Shakespeare's expert, and the mixture by token is below the best
single expert on Milton. Decided by the largest of the mean gates, and by the interval of the paired differences, mixture
less that expert, seeds 0 to 2: an observation. For more steps, and for the gate by sequence, no sign is predicted.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lora_course import experts, lab
from lora_course.experiments import Kept, Runs, Study, Witness, compete, domains, tokenizer_of
from lora_course.experiments import experts as first
from lora_course.lora import AdapterState

SETTINGS: dict[str, Any] = first.SETTINGS | {
    "known": ["bible", "shakespeare", "python"], "left_out": "milton", "expert_rate": 8e-3, "seeds": [0, 1, 2],
    "router_rates": [1e-1, 3e-1, 1.0],
    "arms": {"token": {"steps": 16, "gate_by": "token"}, "longer": {"steps": 48, "gate_by": "token"},
             "sequence": {"steps": 16, "gate_by": "sequence"}},
}  # fmt: skip
KNOWN, LEFT_OUT, ARMS = SETTINGS["known"], SETTINGS["left_out"], SETTINGS["arms"]


@functools.cache
def experts_of(seed: int) -> list[AdapterState]:
    """One LoRA for each domain that is known."""
    rate, steps = SETTINGS["expert_rate"], SETTINGS["steps"]
    found = domains.one_each(SETTINGS, KNOWN, SETTINGS["r"], rate, seed, steps, first.rows)
    return list(found.values())


def singles(seed: int) -> dict[str, Any]:
    """Each expert alone on the text that none has seen."""
    scores = {s: [first.score(state, s, [LEFT_OUT])[LEFT_OUT] for state in experts_of(seed)] for s in ("validation", "test")}  # fmt: skip
    return {f"each on {split}": values for split, values in scores.items()}


def mixture(arm: str, rate: float, seed: int) -> nn.Module:
    """Frozen experts, and routers trained on the text of their domains."""
    rows = domains.mixed_rows(SETTINGS, KNOWN, SETTINGS["steps"] * len(KNOWN), first.rows)
    return domains.routed(SETTINGS, experts_of(seed), rows, rate, seed, **ARMS[arm])


@torch.no_grad()
def gates(model: nn.Module) -> list[list[float]]:
    """The mean gates on the test text that none has seen, `[block][expert]`."""
    text = lab.excerpt(lab.load_text(LEFT_OUT, "test"), 10_000)
    rows = lab.blocks(tokenizer_of(SETTINGS["model"]), text, SETTINGS["length"])
    with lab.evaluating(model):
        model(input_ids=rows[: SETTINGS["usage_rows"]]["input_ids"], use_cache=False)
    return [block.mean((0, 1)).tolist() for block in experts.latest_gates(model).values()]


def score(model: nn.Module, split: str) -> dict[str, Any]:
    if split == "validation":
        return {"bits_per_byte": first.score(model, split, KNOWN)}
    return {"bits_per_byte": first.score(model, split), "gates": gates(model)}


def known(run: Mapping[str, Any]) -> float:
    return statistics.fmean(run["bits_per_byte"][domain] for domain in KNOWN)


def body(runs: Runs) -> None:
    rates, seeds = SETTINGS["router_rates"], SETTINGS["search_seeds"]
    runs.expect(len(runs.seeds) + len(ARMS) * (len(rates) * len(seeds) + len(runs.seeds)))
    for seed in runs.seeds:
        runs(f"singles/{seed}", singles, seed)
    for arm in ARMS:
        compete(runs, arm, Kept(mixture, arm), score, rates, seeds, value=known)


WITNESS = Witness(("token/0.1/0/test",), {"bits_per_byte": 0.005})
STUDY = Study("2_1_project", SETTINGS, body, WITNESS)
