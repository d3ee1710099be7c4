"""Graded problems of chapter 2.2, progressive LoRA: another jagged schedule, and a restart to mend."""

from typing import Any

from lora_course.classroom.draws import Draw
from lora_course.classroom.families.family import Choices, Family


def _schedule_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = [(7, 2, 6, 2), (3, 3, 5, 2)]
    for _ in range(3):
        stages, length, warmup = draw.integer(2, 4), draw.integer(12, 20), 2 * draw.integer(2, 3)
        total = stages * length
        steps = {
            0,
            warmup // 2,
            warmup,
            length - 1,
            length,
            length + 1,
            length + warmup // 2,
            total - 1,
        }
        made += [
            (step, stages, length, warmup)
            for step in sorted(steps | set(draw.sizes(4, 1, total - 1)))
        ]
    return made  # fmt: skip


schedule = Family(
    id="2.2-schedule",
    title="Another jagged schedule",
    points=4,
    minutes=25,
    statement="""
    A run has `stages` stages of `length` steps; `step` counts from 0 over the whole run. The learning rate is multiplied by
    a warm-up and a decay. The warm-up rises linearly over the first steps of each stage. {first} {again} After it the
    warm-up is 1 until the next stage. {start} {decay} {floor}
    """,
    answer='''
    def multiplier(step, stages, length, warmup):
        """step from 0, the run's shape, warmup ≥ 2 and even → a number from 0 to 1"""
        total, given = stages * length, warmup
        stage, inside = divmod(step, length)
        $again
        warm = min(1, $first)
        begin = $start
        u = min(max((step - begin) / (total - begin), 0), 1)
        decay = $decay
        return $floor
    ''',
    conventions={
        "first": {
            "zero": ("At a stage's first step it is 0, and 1 after `warmup` steps.", "inside / warmup"),
            "one": ("At a stage's first step it is `1 / warmup`, so step `warmup - 1` of the stage has 1.", "(inside + 1) / warmup"),
        },
        "again": {
            "same": ("It is equally long in every stage.", "warmup = warmup"),
            "half": ("From the second stage on, `warmup` is half of what was given.", "warmup = warmup if stage == 0 else warmup // 2"),
        },
        "start": {
            "warm": ("The decay is 1 until step `warmup` of the run (as given), and begins to fall there.", "given"),
            "run": ("The decay begins to fall at step 0.", "0"),
            "stage": ("The decay is 1 through the whole first stage, and begins to fall at step `length`.", "length"),
        },
        "decay": {
            "line": ("It falls linearly to 0 at step `stages * length`.", "1 - u"),
            "cosine": ("It falls as half a cosine, $(1 + \\cos \\pi u)/2$, to 0 at step `stages * length`.", "(1 + math.cos(math.pi * u)) / 2"),
            "root": ("It falls as $\\sqrt{1-u}$ to 0 at step `stages * length`, where $u$ rises linearly from 0 to 1.", "math.sqrt(1 - u)"),
        },
        "floor": {
            "none": ("Return the product of the two.", "warm * decay"),
            "floor": ("Return the product of the two, but never less than 0.3 where the warm-up is 1; where it is less than 1 the product counts.", "warm * decay if warm < 1 else max(0.3, decay)"),
        },
    },
    book={"first": "zero", "again": "same", "start": "warm", "decay": ("line", "cosine"), "floor": "none"},
    cases=_schedule_cases,
)  # fmt: skip


def _restart_cases(draw: Draw, choice: Choices) -> list[tuple]:
    made = []
    for number in range(5):
        outputs, inputs, r = (2, 4, 1) if number < 2 else draw.sizes(3, 3, 9)
        inputs, r = max(inputs, r), min(inputs, r)
        A, B = draw.normal(r, inputs), draw.normal(outputs, r)
        state: dict[str, Any] = {"step": draw.integer(5, 90)}
        for key, like in (("A", A), ("B", B)):
            state[f"m_{key}"], state[f"v_{key}"] = (
                draw.normal(*like.shape),
                draw.uniform(*like.shape),
            )
        made.append(
            (
                draw.normal(outputs, inputs),
                A,
                B,
                draw.choice([0.5, 2.0]),
                state,
                draw.normal(r, inputs),
            )
        )
    return made  # fmt: skip


restart = Family(
    id="2.2-restart",
    title="Find the bug: merge and restart",
    points=4,
    minutes=25,
    statement="""
    The function below was meant to end a stage: the weight takes the update, new factors start, and Adam's state is dealt
    with. The loss jumps at each restart. It has two mistakes. Mend it; keep its name and arguments, and leave what it was given as it
    was. It shall do this. After it the model computes what it computed before: the new `B` is zero. {start} {moments} {step}
    """,
    answer='''
    def restart(weight, A, B, scaling, state, fresh):
        """weight [out, in], A and fresh [r, in], B [out, r], a number,
        state {"step", "m_A", "v_A", "m_B", "v_B"} → (weight, A, B, state), all new"""
        merged = weight + scaling * (B @ A)
        new_A = $start
        new_B = torch.zeros_like(B)
        new_state = {"step": $step}
        for key in ("A", "B"):
            m, v = state[f"m_{key}"], state[f"v_{key}"]
            new_state[f"m_{key}"], new_state[f"v_{key}"] = $moments
        return merged, new_A, new_B, new_state
    ''',
    conventions={
        "start": {
            "fresh": ("The new `A` is `fresh`.", "fresh.clone()"),
            "unit": ("The new `A` is `fresh`, each row divided by its norm.", "fresh / fresh.norm(dim=1, keepdim=True)"),
            "orthogonal": (
                "The new `A` is `fresh` less its projection on the rows of the old `A`, so that the two are orthogonal.",
                "fresh - fresh @ torch.linalg.pinv(A) @ A",
            ),
        },
        "moments": {
            "zero": ("Both moments of both factors start at zero.", "m * 0, v * 0"),
            "second": ("First moments start at zero; second moments stay.", "m * 0, v * 1"),
            "tenth": ("Both moments of both factors are cut to a tenth.", "m / 10, v / 10"),
        },
        "step": {
            "reset": ("The count of steps starts at 0 again.", "0"),
            "kept": ("The count of steps goes on.", 'state["step"]'),
        },
    },
    book={"start": "fresh", "moments": "zero", "step": "reset"},
    cases=_restart_cases,
    tolerance=1e-3,
    bugs=(
        ("weight + scaling * (B @ A)", "weight + B @ A"),
        ("torch.zeros_like(B)", "B.clone()"),
        ('for key in ("A", "B")', 'for key in ("A", "A")'),
        ("weight + scaling * (B @ A)", "weight.clone()"),
    ),
)  # fmt: skip

FAMILIES = [schedule, restart]
