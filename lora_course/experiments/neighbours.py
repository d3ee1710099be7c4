"""The neighbours of LoRA that PEFT has, under the rule of `comparison`, and what turning LoRA down after training does.

Base, texts, order, steps, batch, scoring and the search for the rate are those of `comparison`, whose record has the LoRA that
each is paired with by seed. An arm is "method/domain". Then, on one text, LoRA, DoRA and the neighbour with
the lowest mean at other ranks and other batches ("dora r=4/python"), each with its own search. What `CLAIMS` states was stated
before any of these runs.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy
from torch import nn

from lora_course.experiments import Kept, Runs, Study, Witness, compete
from lora_course.experiments import comparison as rule
from lora_course.experiments import peft_methods as peft
from lora_course.experiments.methods import Method
from lora_course.injection import adapter_layers
from lora_course.lab.evidence import differences
from lora_course.lab.study import chosen_rate, load_study

SETTINGS: dict[str, Any] = rule.SETTINGS | {
    "first_of": {
        "pissa": [2e-3, 4e-3, 8e-3], "olora": [2e-3, 4e-3, 8e-3], "eva": [2e-3, 4e-3, 8e-3], "plus": [5e-4, 1e-3, 2e-3],
        "lora_fa": [8e-3, 1.6e-2, 3.2e-2], "oft": [4e-3, 8e-3, 1.6e-2], "vera": [3.2e-2, 6.4e-2, 0.128],
        "loha": [1.6e-2, 3.2e-2, 6.4e-2], "beft": [8e-3, 1.6e-2, 3.2e-2],
    },
    "loraplus_lr_ratio": 16, "vera_r": 256, "strengths": [1.0, 0.8, 0.7, 0.6, 0.5, 0.4], "turned_seeds": [0, 1, 2, 3, 4, 5],
    "other": {"r": [4, 16], "batch": [2, 8]}, "other_domain": "python",
}  # fmt: skip
PISSA = functools.partial(peft.decomposed, start="pissa")
OLORA = functools.partial(peft.decomposed, start="olora")
NEIGHBOURS: dict[str, Method] = {
    "pissa": Method("PiSSA", PISSA, "", "starts from the largest singular directions of each weight"),
    "olora": Method("OLoRA", OLORA, "", "starts from a QR decomposition of each weight"),
    "eva": Method("EVA", peft.eva, "", "A from the directions of each layer's inputs, and ranks by them"),
    "plus": Method("LoRA+", peft.lora_plus, "", "B's rate is 16 times A's"),
    "oft": Method("OFT", peft.oft, "", "rotates the inputs of each weight in blocks of 32"),
    "lora_fa": Method("LoRA-FA", peft.lora_fa, "", "A stays as it was drawn"),
    "vera": Method("VeRA", peft.vera, "", "two vectors a layer between shared random matrices of rank 256"),
    "loha": Method("LoHa", peft.loha, "", "the product, number by number, of two updates of rank 4"),
    "beft": Method("BEFT", peft.beft, "", "a bias for each output, and nothing else"),
}  # fmt: skip

LINES: dict[str, str] = {
    "pissa": 'LoraConfig(init_lora_weights="pissa", **plain)',
    "olora": 'LoraConfig(init_lora_weights="olora", **plain)',
    "eva": 'LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(), **plain)',
    "rslora": "LoraConfig(use_rslora=True, **plain)",
    "plus": "create_loraplus_optimizer(model, AdamW, lr=1e-3, loraplus_lr_ratio=16)",
    "dora": "LoraConfig(use_dora=True, **plain)",
    "oft": 'OFTConfig(oft_block_size=32, target_modules="all-linear")',
    "loha": 'LoHaConfig(r=4, alpha=8, target_modules="all-linear")',
    "lora_fa": "create_lorafa_optimizer(model, r=8, lora_alpha=16, lr=0.016)",
    "vera": 'VeraConfig(r=256, target_modules="all-linear", save_projection=False)',
    "beft": 'BeftConfig(target_modules="all-linear")',
}
"""What switches each on in PEFT, by group: start, scale and optimiser, form, memory. `plain` are LoRA's own fields, `model` a PEFT model."""

SERVED: dict[str, str] = {
    **dict.fromkeys(["eva", "rslora", "plus", "lora_fa"], "LoRA folder"),
    **dict.fromkeys(["pissa", "olora", "loha", "vera"], "converted"),
    **dict.fromkeys(["dora", "oft"], "merged"),
    "beft": "by PEFT alone",
}
"""What a server of LoRA adapters can load: the folder as it is, what PEFT converts it to, or the merged model alone.

BEFT merges into a bias, which the layers of most bases lack: PEFT refuses then."""

OVER_4_BITS = frozenset(LINES) - {"pissa", "loha"}
"""Those that PEFT 0.21 trains over bitsandbytes' 4-bit layers, starting from what the base says."""


class Stated(NamedTuple):
    """What a claim says, by whom, what is expected, and the rule on values that the chapter names."""

    statement: str
    source: str
    expected: str
    rule: str


def _lower(name: str) -> str:
    return f"mean({name}) + 1.2415 * std({name}) < 0"


MARGIN = 0.02  # bits a byte: that of 5.1-b
CLAIMS: dict[str, Stated] = {
    "5.1-p": Stated(
        "Turned down to 0.8 after training, a LoRA forgets less than two thirds as much, and loses less than 0.005 bits a byte of "
        "quality, both beyond noise, with five seeds that had not been seen.",
        "this course, seen with seed 0", "two thirds, 0.005", f"{_lower('forgets')} and {_lower('loses')}",
    ),
    "5.1-t": Stated(
        f"The neighbour with the lowest mean is ahead of LoRA by at most {MARGIN} bits a byte.",
        "arXiv 2602.04998: with tuned rates, LoRA's variants come out alike", f"at most {MARGIN}", f"mean(best) >= -{MARGIN}",
    ),
    "5.1-u": Stated("PiSSA ends lower than LoRA, beyond noise.", "arXiv 2404.02948: ahead of LoRA in 11 models and 5 tasks", "lower", _lower("pissa")),
    "5.1-v": Stated("EVA ends lower than LoRA, beyond noise.", "arXiv 2410.07170: ahead of LoRA on average over its tasks", "lower", _lower("eva")),
    "5.1-w": Stated("LoRA+ ends lower than LoRA, beyond noise.", "arXiv 2402.12354: 1–2% ahead of LoRA", "lower", _lower("plus")),
    "5.1-x": Stated("OFT ends lower than LoRA, beyond noise.", "Beyond LoRA (Hugging Face, 2026): ahead of LoRA on an image task, with less memory", "lower", _lower("oft")),
    "5.1-y": Stated(
        f"VeRA, with a ninth of the numbers, ends more than {MARGIN} bits a byte higher than LoRA, beyond noise.",
        "this course: a smaller file has a price", f"above {MARGIN}", f"mean(vera) - 1.2415 * std(vera) > {MARGIN}",
    ),
    "5.1-z": Stated(
        "AdaLoRA has fewer bits a byte than a LoRA turned down until it forgets as little, beyond noise.",
        "this course, seen with seed 0", "AdaLoRA ahead of the curve", _lower("ahead"),
    ),
    "5.1-ac": Stated(
        f"At ranks 4 and 16 and at batches of 2 and 8 DoRA and the best neighbour stay within {MARGIN} bits a byte of LoRA.",
        "this course", f"within {MARGIN}", f"all(abs(d) < {MARGIN} for d in apart)",
    ),
}  # fmt: skip


def best_neighbour(record: Mapping[str, Any]) -> str | None:
    """The one with the lowest mean on test text over texts and seeds; None while one of them has not run."""
    if len(measured(record)) < len(NEIGHBOURS):
        return None
    return min(NEIGHBOURS, key=lambda name: statistics.fmean(less_loras(record, name)))


def turned_down(domain: str, seed: int) -> dict[str, Any]:
    """Plain LoRA, trained once at its own rate, with its update multiplied by each strength."""
    rate = chosen_rate(load_study("5_1_comparison"), f"lora/{domain}")
    model = rule.train("lora", domain, rate, seed)[0].model
    return {"strengths": {f"{s:g}": at_strength(model, domain, s) for s in SETTINGS["strengths"]}}


def at_strength(model: nn.Module, domain: str, strength: float) -> dict[str, float]:
    for layer in adapter_layers(model).values():
        layer.scaling = strength * SETTINGS["scaling"]
    own = rule.bits_per_byte(model, SETTINGS["own_domain"], "test")
    return {"bits_per_byte": rule.bits_per_byte(model, domain, "test"), "own_domain": own}


def body(runs: Runs) -> None:
    domains, asked = rule.DOMAINS, SETTINGS["search_seeds"]
    paired = [f"{name}/{domain}" for name in NEIGHBOURS for domain in domains]
    turned = [f"turned down/{domain}" for domain in domains]
    elsewhere = f"elsewhere/{SETTINGS['other_domain']}"
    wanted = runs.arms([*paired, *turned, elsewhere])
    others = [(name, value) for name, values in SETTINGS["other"].items() for value in values]
    runs.expect(sum(3 + len(runs.seeds) for arm in paired if arm in wanted))
    strengths = dict.fromkeys([*SETTINGS["turned_seeds"], *runs.seeds])
    runs.expect(len(strengths) * sum(arm in wanted for arm in turned))
    runs.expect(3 * len(others) * (3 + len(runs.seeds)) if elsewhere in wanted else 0)
    for arm in [arm for arm in paired if arm in wanted]:
        name, domain = arm.split("/")
        train = Kept(rule.train_measured, SETTINGS, NEIGHBOURS[name], domain)
        scored = functools.partial(rule.score, domain)
        compete(runs, arm, train, scored, SETTINGS["first_of"][name], asked)
    for arm in [arm for arm in turned if arm in wanted]:
        for seed in strengths:
            runs(f"{arm}/{seed}", turned_down, arm.split("/")[1], seed)
    if elsewhere in wanted and (
        best := best_neighbour({"settings": SETTINGS, "runs": runs.recorded})
    ):
        for name in ("lora", "dora", best):
            for setting, value in others:
                at_another(runs, name, setting, value)


def at_another(runs: Runs, name: str, setting: str, value: int) -> None:
    """A method at another rank or batch, from the rates around the one that it has in the comparison."""
    domain, asked = SETTINGS["other_domain"], SETTINGS["search_seeds"]
    known = {"runs": runs.recorded} if name in NEIGHBOURS else load_study("5_1_comparison")
    method = NEIGHBOURS.get(name) or rule.METHODS[name]
    rate = chosen_rate(known, f"{name}/{domain}")
    train = Kept(rule.train_measured, SETTINGS | {setting: value}, method, domain)
    scored, first = functools.partial(rule.score, domain), [rate / 2, rate, 2 * rate]
    compete(runs, f"{name} {setting}={value}/{domain}", train, scored, first, asked)


TOLERANCES = {"bits_per_byte": 0.005, "own_domain": 0.02, "parameters": 0}
WITNESS = Witness(("pissa/shakespeare/0.004/0/test",), TOLERANCES)
STUDY = Study("5_1_neighbours", SETTINGS, body, WITNESS)


# ------------------------------------------------------------------------------------------------ reading the record


def measured(record: Mapping[str, Any], domains: Sequence[str] = rule.DOMAINS) -> list[str]:
    """The neighbours that have run on these texts with every seed, in the order of `NEIGHBOURS`."""
    seeds, runs = record["settings"]["seeds"], record["runs"]

    def tested(name: str, domain: str) -> set[str]:
        own = (key.split("/") for key in runs if key.startswith(f"{name}/{domain}/"))
        return {parts[3] for parts in own if parts[-1] == "test"}

    wanted = {str(seed) for seed in seeds}
    return [n for n in NEIGHBOURS if all(wanted <= tested(n, d) for d in domains)]


def less_loras(
    record: Mapping[str, Any], name: str, quantity: str = "bits_per_byte", domains: Sequence[str] = rule.DOMAINS
) -> list[float]:  # fmt: skip
    """A neighbour less the comparison's LoRA, seed by seed, as the mean of these texts.

    quantity: a field of the runs; "own_domain" is what is forgotten, since the base is the same.
    """
    lora = load_study("5_1_comparison")
    gaps = [
        differences(*(rule.series(of, arm, domain, quantity) for of, arm in ((record, name), (lora, "lora"))))
        for domain in domains
    ]  # fmt: skip
    return [statistics.fmean(values) for values in zip(*gaps, strict=True)]


def curve(record: Mapping[str, Any], domain: str, seed: int) -> list[tuple[float, float, float]]:
    """(strength, bits a byte, bits a byte on the base's own text) of one LoRA that is turned down, the weakest first."""
    found = record["runs"][f"turned down/{domain}/{seed}"]["strengths"]
    points = [(float(s), run["bits_per_byte"], run["own_domain"]) for s, run in found.items()]
    return sorted(points)


def ahead_of_curve(record: Mapping[str, Any], method: str) -> list[float]:
    """A method of the comparison less a LoRA turned down until it forgets as much: bits a byte, seed by seed, mean of both texts.

    Raises ValueError where the method forgets more or less than every strength.
    """
    lora = load_study("5_1_comparison")
    gaps: list[list[float]] = []
    for domain in rule.DOMAINS:
        quality, kept = (rule.series(lora, method, domain, q) for q in ("bits_per_byte", "own_domain"))  # fmt: skip
        gaps.append([])
        for seed, bits, own in zip(record["settings"]["seeds"], quality, kept, strict=True):
            _, there, forgets = zip(*curve(record, domain, seed), strict=True)
            if not min(forgets) <= own <= max(forgets):
                raise ValueError(
                    f"{method} on {domain} forgets {own:.3f}, and no strength: {min(forgets):.3f} to {max(forgets):.3f}"
                )
            gaps[-1].append(bits - float(numpy.interp(own, forgets, there)))
    return [statistics.fmean(pair) for pair in zip(*gaps, strict=True)]
