"""Graded problems of chapter 2.1, mixtures of adapters: gates of another kind, and a balance loss to mend."""

import torch

from lora_course.classroom.draws import Draw
from lora_course.classroom.families.family import Choices, Family


def _gate_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = [(draw.normal(2, 4), 2), (draw.normal(1, 2, 3) * 2, 2)]
    for experts in draw.sizes(3, 4, 9):
        made.append((draw.normal(*draw.sizes(2, 2, 6), experts) * 2, draw.integer(2, experts - 2)))
        # equal logits: which experts are chosen is then the rule's to say
        equal = torch.randint(0, 3, (7, experts), generator=draw.generator).float()
        made.append((equal, draw.integer(2, experts - 2)))
        made.append((draw.normal(7, experts), made[-1][1]))  # the same shape again
    return made


gates = Family(
    id="2.1-gates",
    title="Gates of another kind",
    points=4,
    minutes=20,
    statement="""
    From a router's logits make gates of the same shape, with zeros for the experts that are not asked. {shared}
    {ties} {weights}
    {temperature}
    """,
    answer='''
    def gates(logits, k):
        """logits [..., E], 2 ≤ k < E - 1 → gates [..., E]"""
        E = logits.shape[-1]
        chosen = torch.zeros_like(logits, dtype=torch.bool)
        chosen[..., :$shared] = True
        others = logits.detach().clone()
        others[..., :$shared] = -torch.inf
        order = $ties
        chosen = chosen.scatter(-1, order[..., : $asked], True)
        z = logits / $temperature
        p = z.softmax(-1)
        return $weights
    '''.replace("$asked", "k - (0 if $shared == 0 else 1)"),
    conventions={
        "shared": {
            "none": ("The k experts of the largest logits are asked.", "0"),
            "one of k": ("Expert 0 is always asked, and with it the k - 1 others of the largest logits.", "1"),
        },
        "ties": {
            "low": ("Of equal logits the expert of the lower index wins.", "others.argsort(dim=-1, descending=True, stable=True)"),
            "high": (
                "Of equal logits the expert of the higher index wins.",
                "E - 1 - others.flip(-1).argsort(dim=-1, descending=True, stable=True)",
            ),
        },
        "weights": {
            "share": (
                "A gate is the softmax over the experts that are asked.",
                "torch.where(chosen, p, 0) / torch.where(chosen, p, 0).sum(-1, keepdim=True)",
            ),
            "all": ("A gate is the softmax over all experts, so the gates may sum to less than one.", "torch.where(chosen, p, 0)"),
            "sigmoid": (
                "A gate is the sigmoid of the logit, divided by the sum of those that are asked.",
                "torch.where(chosen, z.sigmoid(), 0) / torch.where(chosen, z.sigmoid(), 0).sum(-1, keepdim=True)",
            ),
        },
        "temperature": {
            "1": ("Logits are used as they are.", "1"),
            "2": ("For the gates, though not for the choice, logits are divided by 2 first.", "2"),
            "half": ("For the gates, though not for the choice, logits are multiplied by 2 first.", "0.5"),
        },
    },
    book={"shared": "none", "ties": "low", "weights": "share", "temperature": "1"},
    cases=_gate_cases,
    gradients=("logits",),
)  # fmt: skip


def _balance_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = [((draw.normal(1, 3, 3) * 2).softmax(-1), torch.ones(1, 3, dtype=torch.bool), 2)]
    made.append(
        ((draw.normal(2, 3, 3) * 2).softmax(-1), torch.tensor([[True] * 3, [False, True, True]]), 2)
    )
    for number in range(4):
        if number % 2 == 0:  # each shape twice: what is kept from an earlier call shows
            rows, length, experts = draw.sizes(3, 3, 8)
        real = (
            torch.arange(length)[None]
            >= torch.tensor([draw.integer(0, length - 1 - 1) for _ in range(rows)])[:, None]
        )
        made.append(
            (
                (draw.normal(rows, length, experts) * 3).softmax(-1),
                real,
                draw.integer(2, experts - 1),
            )
        )
    return made  # fmt: skip


balance = Family(
    id="2.1-balance",
    title="Find the bug: a balance loss",
    points=5,
    minutes=30,
    statement="""
    The function below was meant to be a balance loss, and a router trained with it sends everything to one expert or
    nowhere in particular. It has two mistakes. Mend it; keep its name and arguments. It shall do this. Only tokens where
    `real` is true count. {groups} $f_e$ is the share of choices that fall on expert $e$; {chosen} $P_e$ is {mean} The loss
    is $E \\sum_e f_e P_e${excess} It has a gradient through $P$.
    """,
    answer='''
    def balance(p, real, k):
        """p [B, T, E], real [B, T] bool, k → a scalar tensor with a gradient"""
        experts = p.shape[-1]
        losses = []
        for probabilities, keep in $groups:
            tokens = probabilities[keep]
            chosen = torch.zeros_like(tokens)
            chosen.scatter_(1, tokens.topk($chosen, dim=1).indices, 1.0)
            f = chosen.sum(0) / chosen.sum()
            weights = $mean
            P = weights.mean(0)
            losses.append(experts * (f * P).sum() - $excess)
        return torch.stack(losses).mean()
    ''',
    conventions={
        "groups": {
            "batch": ("$f$ and $P$ are taken over all tokens of the batch at once.", "[(p.flatten(0, 1), real.flatten())]"),
            "row": (
                "$f$ and $P$ are taken over each row of the batch by itself, and the loss is the mean over rows.",
                "zip(p, real)",
            ),
        },
        "chosen": {
            "one": ("a token chooses the expert of its largest probability.", "1"),
            "k": ("a token chooses the `k` experts of its largest probabilities.", "k"),
        },
        "mean": {
            "plain": ("the mean of the expert's probability over those tokens.", "tokens"),
            "kept": (
                "the mean over those tokens of the expert's gate: its probability divided by the sum of the chosen ones, or 0 where it is not chosen.",
                "tokens * chosen / (tokens * chosen).sum(1, keepdim=True)",
            ),
            "square": ("the mean of the expert's squared probability over those tokens.", "tokens**2"),
        },
        "excess": {
            "none": (".", "0"),
            "one": (", less 1.", "1"),
        },
    },
    book={"groups": "batch", "chosen": ("one", "k"), "mean": "plain", "excess": "none"},
    degenerate={"chosen": "one", "mean": "kept"},  # the gate of one chosen expert is 1, so P is f and has no slope
    cases=_balance_cases,
    gradients=("p",),
    bugs=(
        ("tokens = probabilities[keep]", "tokens = probabilities"),
        ("f = chosen.sum(0) / chosen.sum()", "f = chosen.sum(0) / chosen.shape[1]"),
        ("P = weights.mean(0)", "P = weights.detach().mean(0)"),
        ("experts * (f * P).sum()", "(f * P).sum()"),
        ("experts * (f * P).sum()", "experts * (f * f).sum()"),
    ),
)  # fmt: skip

FAMILIES = [gates, balance]
