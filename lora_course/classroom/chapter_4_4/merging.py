"""Exercises 4.4-b and 4.4-d: what a merge in few bits loses, and how often somebody merged."""

import torch

from lora_course.classroom.comparison import as_tensor
from lora_course.classroom.exercises import Draw, case, exercise, mistake


def merge_rounded(W, A, B, scaling):
    delta = scaling * B @ A
    return _merged(W, (W.float() + delta).to(W.dtype), delta)


def _merged(W, merged, delta):
    """The merged weight, and the share of the entries with an update that stayed."""
    moved = delta != 0
    return merged, ((merged == W) & moved).sum().item() / max(1, moved.sum().item())


def _use_merged(found, W, A, B, scaling):
    """What arrived in the weight, and the share."""
    mistake(
        not isinstance(found, (tuple, list)) or len(found) != 2,
        "Two things are expected: the merged weight, and a number from 0 to 1.",
    )
    merged, share = as_tensor(found[0]), as_tensor(found[1])
    mistake(
        merged is None or merged.shape != W.shape,
        "The merged weight has the shape of W, {}.",
        list(W.shape),
    )
    mistake(
        merged.dtype != W.dtype,
        "The merged weight is of W's type, {}; yours is {}.",
        str(W.dtype).removeprefix("torch."),
        str(merged.dtype).removeprefix("torch."),
    )
    mistake(share is None or share.numel() != 1, "One number is expected for the share.")
    return {"what arrived in W": merged.double() - W.double(), "the share": float(share)}


def _in_its_type(W, A, B, scaling):
    delta = scaling * B @ A
    return _merged(W, W + delta.to(W.dtype), delta)


def _other_share(share):
    """The right weight, with another share of (merged, W, ΔW)."""

    def answer(W, A, B, scaling):
        merged, _ = merge_rounded(W, A, B, scaling)
        return merged, float(share(merged, W, scaling * B @ A))

    return answer


ROUNDED_MISTAKES = {
    "ΔW is rounded to W's type before it is added: compute the sum in fp32, and round once.": _in_its_type,
    "The scale is missing.": lambda W, A, B, s: merge_rounded(W, A, B, 1.0),
    "ΔW is taken away; it is added.": lambda W, A, B, s: merge_rounded(W, A, B, -s),
    "Nothing is merged: the weight is as it was.": lambda W, A, B, s: (W.clone(), merge_rounded(W, A, B, s)[1]),
    "The share counts entries without an update, too; of these none can be lost.":
        _other_share(lambda merged, W, delta: (merged == W).float().mean()),
    "The share counts the lost entries, and divides by all; divide by those that have an update.":
        _other_share(lambda merged, W, delta: ((merged == W) & (delta != 0)).float().mean()),
    "This is the share of the entries that did change.":
        _other_share(lambda merged, W, delta: (merged != W).sum() / (delta != 0).sum().clamp(min=1)),
    "A share is expected, from 0 to 1, not a number of entries.":
        _other_share(lambda merged, W, delta: ((merged == W) & (delta != 0)).sum()),
    "A share is expected, not percent.": lambda W, A, B, s: (lambda merged, share: (merged, 100 * share))(*merge_rounded(W, A, B, s)),
    "This compares up to a tolerance; count the entries that are exactly as they were.":
        _other_share(lambda merged, W, delta: (torch.isclose(merged, W) & (delta != 0)).sum() / (delta != 0).sum().clamp(min=1)),
}  # fmt: skip


@exercise(
    "4.4-b",
    right=merge_rounded,
    look=_use_merged,
    mistakes=ROUNDED_MISTAKES,
    otherwise="The merged weight or the share is not what the text asks for.",
)
def check_merge_rounded(draw: Draw):
    """A merge in the weight's type. ΔW has so few bits that fp32 computes it exactly, in any order, and most sums as well."""
    for dtype, kind, largest, hint in [
        (torch.bfloat16, "", 60, ""),
        (torch.bfloat16, "rows", 60, "With rows of B that are zero it goes wrong: their entries have no update."),
        (torch.float16, "", 8, "In fp16 it goes wrong: use W's own type."),
        (torch.float32, "tiny", 60, "In fp32, with a tiny ΔW, it goes wrong: an entry is lost if it is exactly as it was."),
        (torch.bfloat16, "none", 60, "Where B is zero it goes wrong: with no update, the share is 0."),
        (torch.bfloat16, "single", 60, "Where a single entry has an update it goes wrong."),
        (torch.bfloat16, "", 60, ""),
    ]:  # fmt: skip
        outputs, inputs, r = (*draw.sizes(2, 20, 30), draw.integer(2, 4))
        W = (draw.normal(outputs, inputs) * 2**12).round() / 2**12
        A = torch.tensor(
            [[draw.integer(-largest, largest) for _ in range(inputs)] for _ in range(r)]
        )
        B = torch.tensor([[draw.integer(-60, 60) for _ in range(r)] for _ in range(outputs)])
        if kind in ("rows", "none"):
            B[slice(None) if kind == "none" else draw.order(outputs)[: outputs // 3]] = 0
        if kind == "single":  # and a large weight there, so that it is lost
            B[1:], A[:, 1:], W[0, 0] = 0, 0, 3.0
            A[:, 0], B[0] = 1, torch.arange(1, r + 1)
        scaling = draw.choice([0.25, 0.5, 0.75, 1.5]) / (2**12 if kind == "tiny" else 1)
        yield case(W.to(dtype), A / 2**9, B / 2**10, scaling, hint=hint)


def times_merged(original, now, A, B, scaling):
    delta = scaling * B @ A
    change = now.float() - original.float()
    return round(((change * delta).sum() / delta.square().sum()).item())


def _times(count):
    return lambda original, now, A, B, scaling: count(
        original.float(), now.float(), scaling * B @ A
    )


def _is_whole(found, **arguments):
    number = as_tensor(found)
    mistake(
        isinstance(found, bool) or number is not None and number.dtype == torch.bool,
        "How many times is asked, not whether: a weight into which ΔW was merged twice is not merged well either.",
    )
    mistake(number is None or number.numel() != 1, "A whole number is expected.")
    mistake(
        float(number) != round(float(number)) if number.isfinite() else True,
        "A whole number is expected: round it.",
    )
    return int(number)  # fmt: skip


TIMES_MISTAKES = {
    "A weight with ΔW in it twice counts as once: a double merge looks like a single one to your function.":
        _times(lambda was, now, d: int(not torch.equal(was, now))),
    "ΔW is scaling · B A, with the scale.": lambda o, n, A, B, s: times_merged(o, n, A, B, 1.0),
    "A norm has no sign, a scalar product with ΔW has: a weight from which ΔW was taken away counts as merged.":
        _times(lambda was, now, d: round(((now - was).norm() / d.norm()).item())),
    "Something is squared: twice counts as four times.":
        _times(lambda was, now, d: round(((now - was).square().sum() / d.square().sum()).item())),
    "The sign is turned: the change is now less the original.": lambda o, n, A, B, s: times_merged(n, o, A, B, s),
    "The change is the weight now, less the original.": _times(lambda was, now, d: round(((now * d).sum() / d.square().sum()).item())),
    "Digits are cut, so that 1.98 becomes 1: round to the nearest.":
        _times(lambda was, now, d: int(((now - was) * d).sum() / d.square().sum())),
    "Negative numbers are rounded up: int(x + 1/2) makes −1 of −2.":
        _times(lambda was, now, d: int(((now - was) * d).sum() / d.square().sum() + 0.5)),
    "This is a cosine: it tells the direction, and not how often.":
        _times(lambda was, now, d: round(torch.nn.functional.cosine_similarity((now - was).flatten(), d.flatten(), 0).item())),
}  # fmt: skip


@exercise(
    "4.4-d",
    points=2,
    right=times_merged,
    look=_is_whole,
    mistakes=TIMES_MISTAKES,
    otherwise="The number is wrong: take all entries together, since each is rounded, and find how much of ΔW the change holds.",
)
def check_times_merged(draw: Draw):
    """How often ΔW is in a weight, in three types; it may be small beside the steps of the type."""
    few = "In 16 bits the weight is rounded, and it goes wrong: look for the nearest whole number, over all entries."
    filed = "In fp32, after a file in bf16, it goes wrong: what rounding changes in a weight has nothing to do with ΔW."
    small = "In fp16, with weights as small as a model's, it goes wrong: compute in fp32, where small products are not lost."
    for times, dtype, size, hint in [
        (2, torch.float32, 0.5, ""),
        (1, torch.float32, 0.5, ""),
        (0, torch.float32, 0.5, "For the original weight it goes wrong: the answer is 0."),
        (-1, torch.float32, 0.5, "Where ΔW was taken away once too often it goes wrong: the answer is −1."),
        (draw.integer(3, 9), torch.float32, 0.5, "Where it was merged many times it goes wrong."),
        (-draw.integer(2, 5), torch.float32, 1e-4, "With a small ΔW it goes wrong."),
        (0, torch.bfloat16, 0.15, few),
        (2, torch.bfloat16, 0.15, few),
        (-2, torch.bfloat16, 0.15, few),
        (1, torch.bfloat16, 0.0035, few),
        (draw.integer(3, 4), torch.bfloat16, 0.0035, few),
        (-1, torch.bfloat16, 0.0035, few),
        (3, torch.float16, 4e-4, few),
        (3, torch.float16, 1e-4, small),
        (0, torch.float32, 0.002, filed),
        (2, torch.float32, 0.002, filed),
    ]:  # fmt: skip
        outputs, inputs = draw.sizes(2, 50, 70)
        A, B = draw.normal(2, inputs), draw.normal(outputs, 2)
        A[:, 0], B[0] = 0, 0
        B -= (B.sum(0) / (B != 0).sum(0)) * (B != 0)  # the entries of ΔW add up to nothing
        scaling = draw.number(1.5, 4)
        B *= size / (scaling * B @ A).std()
        original, delta = draw.normal(outputs, inputs), scaling * B @ A
        original *= 0.02 if hint == small else 1
        original.view(-1)[delta.abs().argmax()] = 40.0  # an outlier, as large weights have
        original = original.to(dtype)
        now = original.clone()
        for _ in range(abs(times)):
            now = (now.float() + (delta if times > 0 else -delta)).to(dtype)
        if hint == filed:
            now = now.bfloat16().float()
        yield case(original, now, A, B, scaling, hint=hint)
