"""Graded problems of chapter 3.2, distillation: a loss to mend, and a mixture of teachers of another kind."""

import torch

from lora_course.classroom.draws import Draw
from lora_course.classroom.families.family import Choices, Family


def _loss_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = []
    for number in range(5):
        rows, length, words = (
            (1, 3, 3) if number == 0 else (2, 3, 2) if number == 1 else draw.sizes(3, 3, 7)
        )
        labels = torch.randint(0, words, (rows, length), generator=draw.generator)
        for row in range(rows):  # rows keep different numbers of tokens
            labels[row, : min(row, length - 2)] = -100
        student, teacher = (
            draw.normal(rows, length, words) * 2,
            draw.normal(rows, length, words) * 2,
        )
        made.append(
            (student, teacher, labels, draw.choice([0.2, 0.3, 0.7]), draw.choice([1.5, 2.0, 3.0]))
        )
    return made  # fmt: skip


loss = Family(
    id="3.2-loss",
    title="Find the bug: a distillation loss",
    points=5,
    minutes=30,
    statement="""
    The function below was meant to be a distillation loss of a causal model, and the student learns the wrong thing. It has
    two mistakes. Mend it; keep its name and arguments. It shall do this. The logits at position $t$ predict the label at $t + 1$; a
    label of −100 does not count. Let $p$ be the teacher's and $q$ the student's softmax, both at temperature $T$. A
    token's divergence is {direction} multiplied by {factor} {mean} {weight} There is a gradient in the student's logits.
    """,
    answer='''
    def loss(student, teacher, labels, alpha, T):
        """student, teacher [B, L, V], labels [B, L], two numbers → a scalar tensor with a gradient"""
        z, t, y = student[:, :-1], teacher[:, :-1], labels[:, 1:]
        keep = (y != -100).float()
        log_q, log_p = (z / T).log_softmax(-1), (t / T).log_softmax(-1)
        divergence = $factor * ($direction).sum(-1)
        hard = F.cross_entropy(z.transpose(1, 2), y, reduction="none", ignore_index=-100)
        token = $weight
        return $mean
    ''',
    conventions={
        "direction": {
            "forward": ("$\\mathrm{KL}(p\\,\\|\\,q)$,", "log_p.exp() * (log_p - log_q)"),
            "reverse": ("$\\mathrm{KL}(q\\,\\|\\,p)$,", "log_q.exp() * (log_q - log_p)"),
            "both": ("the mean of $\\mathrm{KL}(p\\,\\|\\,q)$ and $\\mathrm{KL}(q\\,\\|\\,p)$,", "(log_p.exp() - log_q.exp()) * (log_p - log_q) / 2"),
        },
        "factor": {
            "T2": ("$T^2$.", "T**2"),
            "T": ("$T$.", "T"),
        },
        "weight": {
            "soft": ("A token's loss is $\\alpha$ times its divergence plus $1 - \\alpha$ times its cross-entropy at temperature 1.", "alpha * divergence + (1 - alpha) * hard"),
            "hard": ("A token's loss is $\\alpha$ times its cross-entropy at temperature 1 plus $1 - \\alpha$ times its divergence.", "alpha * hard + (1 - alpha) * divergence"),
            "sum": ("A token's loss is its cross-entropy at temperature 1 plus $\\alpha$ times its divergence.", "hard + alpha * divergence"),
        },
        "mean": {
            "tokens": ("The loss is the mean over all tokens that count.", "(token * keep).sum() / keep.sum()"),
            "rows": (
                "The loss is the mean over rows of each row's mean over its tokens that count.",
                "((token * keep).sum(1) / keep.sum(1)).mean()",
            ),
        },
    },
    book={"direction": ("forward", "reverse"), "factor": "T2", "weight": "soft", "mean": "tokens"},
    cases=_loss_cases,
    gradients=("student",),
    bugs=(
        ("labels[:, 1:]", "labels[:, :-1]"),
        ("(z / T).log_softmax(-1)", "z.log_softmax(-1)"),
        ("(t / T).log_softmax(-1)", "t.log_softmax(-1)"),
        ("(y != -100).float()", "torch.ones(y.shape)"),
    ),
)  # fmt: skip


def _mixture_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = [
        (draw.normal(2, 3), torch.tensor([1.0, 2.0]), 2.0),
        (draw.normal(2, 4), torch.tensor([0.5, 0.25]), 1.5),
    ]
    for _ in range(5):
        teachers, words = draw.sizes(2, 2, 8)
        made.append(
            (
                draw.normal(teachers, words) * 3,
                draw.uniform(teachers) * 2 + 0.1,
                draw.choice([0.5, 1.5, 3.0]),
            )
        )
    # logits so far apart that probabilities underflow: the mixture of logarithms must stay finite
    made.append(
        (torch.tensor([[0.0, 300.0, -300.0], [0.0, 250.0, -320.0]]), torch.tensor([0.3, 0.6]), 1.0)
    )
    return made  # fmt: skip


mixture = Family(
    id="3.2-mixture",
    title="A mixture of teachers",
    points=3,
    minutes=20,
    statement="""
    Return the logarithm of the distribution that several teachers give together; it stays finite where probabilities
    underflow. {weights} {kind} {temperature} The result is normalised: its exponentials sum to one.
    """,
    answer='''
    def mix(logits, weights, T):
        """logits [teachers, V], weights [teachers] > 0, a number → log probabilities [V]"""
        w = $weights
        before, after = $temperature
        each = (logits / before).log_softmax(-1)
        both = $kind
        return (both / after).log_softmax(-1)
    ''',
    conventions={
        "weights": {
            "share": ("The weights are divided by their sum.", "weights / weights.sum()"),
            "softmax": ("The softmax of the weights counts.", "weights.softmax(0)"),
            "square": ("The squares of the weights count, divided by their sum.", "weights**2 / (weights**2).sum()"),
        },
        "kind": {
            "arithmetic": ("Probabilities are averaged with these weights.", "torch.logsumexp(each + w.log()[:, None], 0)"),
            "root": ("The square roots of probabilities are averaged with these weights, and the average is squared.", "2 * torch.logsumexp(each / 2 + w.log()[:, None], 0)"),
            "largest": ("Each word gets the largest of its weighted probabilities.", "(each + w.log()[:, None]).amax(0)"),
        },
        "temperature": {
            "before": ("Each teacher's logits are divided by $T$ before its softmax.", "T, 1"),
            "after": (
                "The teachers' softmax is at temperature 1; the logarithms of the mixture are divided by $T$ before they are normalised.",
                "1, T",
            ),
        },
    },
    book={"weights": ("given", "share"), "kind": "arithmetic", "temperature": "before"},
    cases=_mixture_cases,
)  # fmt: skip

FAMILIES = [loss, mixture]
