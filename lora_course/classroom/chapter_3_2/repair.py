"""Exercise 3.2-c: a mean out of batchmean."""

import torch

from lora_course.classroom.exercises import Draw, case, exercise


def a_token(batchmean, labels):
    return float(batchmean) * len(labels) / int((labels[:, 1:] != -100).sum())


def _count(labels):
    return (labels != -100).sum()


TOKEN_MISTAKES = {
    "Nothing has changed: it is still the sum divided by B.": lambda batchmean, labels: batchmean,
    "This is the sum; divide it by the tokens that count.": lambda batchmean, labels: batchmean * len(labels),
    "You divide by the length: right only where every position counts.": lambda batchmean, labels: batchmean / labels.shape[1],
    "You divide by the length less one: right only where every position counts.":
        lambda batchmean, labels: batchmean / (labels.shape[1] - 1),
    "You count all labels. The first token of a text has no logits before it, so its label counts nowhere: labels[:, 1:].":
        lambda batchmean, labels: batchmean * len(labels) / _count(labels),
    "You divide by the tokens that count, but batchmean has been divided by B already: multiply by B first.":
        lambda batchmean, labels: batchmean / _count(labels[:, 1:]),
    "You count the labels at the logits' own positions: the label of position t + 1 decides about the logits at t.":
        lambda batchmean, labels: batchmean * len(labels) / _count(labels[:, :-1]),
    "You count the labels that are −100; the others are asked for.":
        lambda batchmean, labels: batchmean * len(labels) / (labels[:, 1:] == -100).sum(),
    "Label 0 is a token like others; only −100 does not count.":
        lambda batchmean, labels: batchmean * len(labels) / (labels[:, 1:] > 0).sum(),
    "You divide by B once more; multiply by it, since batchmean has divided.":
        lambda batchmean, labels: batchmean / len(labels) / _count(labels[:, 1:]),
}  # fmt: skip


@exercise(
    "3.2-c",
    right=a_token,
    mistakes=TOKEN_MISTAKES,
    otherwise="This is not the mean over the tokens that count.",
)
def check_a_token(draw: Draw):
    """The mean over tokens, from what batchmean returns."""
    for B, hint in [
        (draw.integer(3, 5), ""),
        (draw.integer(6, 8), ""),
        (1, "With a single row it goes wrong."),
        (2, "Where a row counts nowhere it goes wrong."),
    ]:
        length = draw.integer(10, 16)
        labels = torch.randint(0, 4, (B, length), generator=draw.generator)
        for row in range(B):
            labels[row, : draw.integer(0, 3)] = -100
            labels[row, length - draw.integer(1, 4) :] = -100
        # more first labels than last ones count, or counting those at the logits' own places would do
        labels[:2, 0], labels[0, 1:3], labels[0, -1] = 1, 0, 2
        if B == 2:
            labels[1] = -100
        number = draw.number(1, 9)
        yield case(torch.tensor(number) if B % 2 else number, labels, hint=hint)
