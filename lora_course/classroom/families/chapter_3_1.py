"""Graded problems of chapter 3.1, adaptive rank: what a layer is worth, and who grows."""

from lora_course.classroom.draws import Draw
from lora_course.classroom.families.family import Choices, Family


def _worth_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = []
    for number in range(5):
        r, inputs, outputs = (2, 3, 4) if number < 2 else draw.sizes(3, 2, 9)
        made.append(
            (
                draw.normal(r, inputs),
                draw.normal(outputs, r),
                draw.normal(r, inputs),
                draw.normal(outputs, r),
            )
        )
    return made  # fmt: skip


worth = Family(
    id="3.1-worth",
    title="What is a layer worth?",
    points=3,
    minutes=20,
    statement="""
    A layer has the update $\\sum_i b_i a_i^\\top$, and the loss has the gradients `grad_A` and `grad_B`; they may come from
    different batches, so no identity between them holds. {side} {together} {size}
    """,
    answer='''
    def worth(A, B, grad_A, grad_B):
        """A, grad_A [r, in], B, grad_B [out, r] → a number"""
        of_A, of_B = (A * grad_A).sum(1), (B * grad_B).sum(0)
        each = $side
        return float($together / $size)
    ''',
    conventions={
        "side": {
            "B": ("What rank $i$ does to the loss is $\\langle b_i, \\partial L / \\partial b_i \\rangle$.", "of_B"),
            "A": ("What rank $i$ does to the loss is $\\langle a_i, \\partial L / \\partial a_i \\rangle$.", "of_A"),
            "both": (
                "What rank $i$ does to the loss is $\\langle a_i, \\partial L / \\partial a_i \\rangle + \\langle b_i, \\partial L / \\partial b_i \\rangle$.",
                "(of_A + of_B)",
            ),
        },
        "together": {
            "sum": ("Over the ranks, take the sum of the magnitudes.", "each.abs().sum()"),
            "norm": ("Over the ranks, take the root of the sum of the squares.", "each.norm()"),
            "net": ("Over the ranks, take the magnitude of the sum.", "each.sum().abs()"),
            "best": ("Over the ranks, take the largest of the magnitudes.", "each.abs().max()"),
        },
        "size": {
            "root": ("The layer's worth is that number divided by $\\sqrt{in \\cdot out}$.", "math.sqrt(A.shape[1] * B.shape[0])"),
            "parameters": ("The layer's worth is that number divided by the number of parameters of `A` and `B` together.", "(A.numel() + B.numel())"),
            "rank": ("The layer's worth is that number divided by the rank.", "A.shape[0]"),
        },
    },
    book={"side": "B", "together": "sum", "size": "root"},
    cases=_worth_cases,
)  # fmt: skip


def _plan_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = [({"q": 3.0, "v": 2.0, "up": 1.0}, {"q": 2, "v": 2, "up": 2}, 9, 2, 1, 4)]
    made.append(({"q": 1.0, "v": 1.0, "up": 2.0}, {"q": 3, "v": 1, "up": 4}, 12, 2, 2, 4))
    for _ in range(50):
        names = [f"layer{i}" for i in range(draw.integer(4, 7))]
        top, add, max_r = draw.integer(2, 3), draw.integer(2, 3), draw.integer(5, 7)
        scores = {name: float(draw.integer(1, 3)) * draw.choice([1, 2, 6]) for name in names}
        ranks = {name: draw.integer(1, max_r) for name in names}
        budget = sum(ranks.values()) + draw.integer(1, top * add + 2)
        made.append((scores, ranks, budget, top, add, max_r))
    return made


plan = Family(
    id="3.1-plan",
    title="Who grows?",
    points=4,
    minutes=25,
    statement="""
    Layers have scores and ranks. In one round ranks are handed out, to the layers in order of {score} {ties} A layer
    gains up to `add` ranks. {limit} In one round no more than `top * add` ranks are handed out, and all ranks together stay
    within `budget`. {left} Return the gains by layer, without layers that gain nothing.
    """,
    answer='''
    def grow(scores, ranks, budget, top, add, max_r):
        """two dictionaries by layer, four whole numbers → {layer: ranks gained}"""
        left = min(top * add, budget - sum(ranks.values()))
        names = $ties
        order = sorted(names, key=lambda name: -$score)
        gains = {}
        for name in $left:
            gain = min(add, $limit - ranks[name], left)
            if gain > 0:
                gains[name] = gain
                left -= gain
        return gains
    ''',
    conventions={
        "score": {
            "score": ("score, the highest first.", "scores[name]"),
            "per rank": ("score divided by the rank that the layer has, the highest first.", "(scores[name] / ranks[name])"),
            "left": ("score times the ranks that it lacks to `max_r`, the highest first.", "(scores[name] * (max_r - ranks[name]))"),
        },
        "ties": {
            "first": ("Of equals the one listed first comes first.", "list(scores)"),
            "last": ("Of equals the one listed last comes first.", "list(reversed(scores))"),
        },
        "limit": {
            "max": ("Its rank may become `max_r`, and no more.", "max_r"),
            "below": ("Its rank must stay below `max_r`.", "(max_r - 1)"),
            "double": ("Its rank may become `max_r`, and no more, nor may it more than double.", "min(max_r, 2 * ranks[name])"),
        },
        "left": {
            "next": ("What a layer has no room for goes to the next in order.", "order"),
            "lost": ("Only the first `top` layers of the order take part: what they have no room for is not handed out.", "order[:top]"),
        },
    },
    book={"score": "score", "ties": "first", "limit": "max", "left": "next"},
    cases=_plan_cases,
)  # fmt: skip

FAMILIES = [worth, plan]
