"""Graded problems of chapter 4.2, nested LoRA: weights of another mean, and a cut with its own rules."""

from lora_course.classroom.draws import Draw
from lora_course.classroom.families.family import Choices, Family


def _weight_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = [([1, 2], 3), ([1, 3], 4)]
    for count in (1, 2, 3, 4):
        ranks = sorted(draw.sizes(count, 1, 12))
        made += [(ranks, max(ranks)), (ranks, max(ranks) + draw.integer(1, 3))]
    return made


weights = Family(
    id="4.2-weights",
    title="Weights of another mean",
    points=3,
    minutes=20,
    statement="""
    An adapter of rank `r` is trained at several cuts; `ranks` rises, and its largest is at most `r`. {cut} {share} {beyond}
    {scale} Return the weight with which each of the `r` rows takes part.
    """,
    answer='''
    def weights(ranks, r):
        """rising whole numbers, r ≥ the largest → r numbers"""
        shares = [$share for b in ranks]
        total = sum(shares)
        found = []
        for row in range(1, r + 1):
            inside = [share / total for share, b, before in zip(shares, ranks, [0, *ranks]) if $cut]
            found.append(sum(inside))
        found = $scale
        return [w if row < ranks[-1] else $beyond for row, w in enumerate(found)]
    ''',
    conventions={
        "cut": {
            "prefix": ("The cut at $b$ trains rows 1 to $b$.", "row <= b"),
            "block": ("The cut at $b$ trains the rows above the next smaller cut, up to $b$; the smallest cut trains rows 1 to $b$.", "before < row <= b"),
            "suffix": ("The cut at $b$ trains row $b$ and those after it, up to the largest of `ranks`.", "row >= b"),
        },
        "share": {
            "equal": ("All cuts weigh the same; their weights sum to one.", "1"),
            "rank": ("A cut weighs in proportion to $b$; their weights sum to one.", "b"),
            "inverse": ("A cut weighs in proportion to $1/b$; their weights sum to one.", "1 / b"),
        },
        "beyond": {
            "zero": ("Rows above the largest of `ranks` have weight 0.", "0.0"),
            "one": ("Rows above the largest of `ranks` have weight 1.", "1.0"),
        },
        "scale": {
            "none": ("A row's weight is the sum of the weights of the cuts that train it.", "found"),
            "root": ("A row's weight is the square root of the sum of the weights of the cuts that train it.", "[math.sqrt(w) for w in found]"),
            "mean": (
                "A row's weight is the sum of the weights of the cuts that train it, divided by the mean of these sums over rows 1 to the largest of `ranks`.",
                "[w * ranks[-1] / sum(found[: ranks[-1]]) for w in found]",
            ),
        },
    },
    book={"cut": "prefix", "share": "equal", "beyond": "zero", "scale": "none"},
    cases=_weight_cases,
)  # fmt: skip


def _cut_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = [
        (draw.normal(3, 2), draw.normal(2, 3), 6.0, 2),
        (draw.normal(2, 3), draw.normal(2, 2), 3.0, 1),
    ]
    for _ in range(5):
        r, inputs, outputs = draw.sizes(3, 3, 9)
        made.append(
            (
                draw.normal(r, inputs),
                draw.normal(outputs, r),
                float(draw.integer(r + 1, 30)),
                draw.integer(1, r - 1),
            )
        )
    return made  # fmt: skip


cut = Family(
    id="4.2-cut",
    title="A cut with its own rules",
    points=4,
    minutes=20,
    statement="""
    Cut an adapter of rank $r$ to `b` of its ranks, for a server whose scale is {rule} `lora_alpha` belongs to the whole adapter, by
    the same rule. {which} {keep} {carrier}
    """,
    answer='''
    def cut(A, B, lora_alpha, b):
        """A [r, in], B [out, r], a number, b < r → A [b, in], B [out, b], lora_alpha"""
        def divisor(rank):
            return $rule

        kept = $which
        scale = lora_alpha / divisor(A.shape[0]) * $keep
        new_A, new_B = A[kept], B[:, kept]
        $carrier
        return new_A, new_B, alpha
    ''',
    conventions={
        "rule": {
            "rank": ("`lora_alpha` divided by the rank.", "rank"),
            "root": ("`lora_alpha` divided by the root of the rank.", "math.sqrt(rank)"),
        },
        "which": {
            "first": ("The first `b` ranks stay.", "torch.arange(b)"),
            "last": ("The last `b` ranks stay, in their order.", "torch.arange(A.shape[0] - b, A.shape[0])"),
            "largest": (
                "The `b` ranks stay whose row of `A` and column of `B` have the largest product of norms; they keep their order.",
                "(A.norm(dim=1) * B.norm(dim=0)).topk(b).indices.sort().values",
            ),
        },
        "keep": {
            "whole": ("The cut runs at the scale that the whole adapter had.", "1"),
            "more": ("The cut runs at the scale that the whole adapter had, times $r / b$.", "A.shape[0] / b"),
        },
        "carrier": {
            "alpha": ("The factors' entries stay; the returned `lora_alpha` sees to the scale.", "alpha = scale * divisor(b)"),
            "B": (
                "The returned `lora_alpha` is 1; `B` is multiplied so that the scale is right, and `A` stays.",
                "alpha = 1.0\nnew_B = new_B * scale * divisor(b)",
            ),
            "both": (
                "The returned `lora_alpha` is 1; `A` and `B` are multiplied by the same number so that the scale is right.",
                "alpha = 1.0\nnew_A, new_B = (t * math.sqrt(scale * divisor(b)) for t in (new_A, new_B))",
            ),
        },
    },
    book={"rule": "rank", "which": "first", "keep": "whole", "carrier": "alpha"},
    cases=_cut_cases,
)  # fmt: skip

FAMILIES = [weights, cut]
