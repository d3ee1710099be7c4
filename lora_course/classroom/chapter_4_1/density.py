"""Exercise 4.1-b: how dense the update of masked factors is."""

from lora_course.classroom.exercises import Draw, case, exercise


def density(r, sparsity_A, sparsity_B):
    return 1 - (1 - (1 - sparsity_A) * (1 - sparsity_B)) ** r


DENSITY_MISTAKES = {
    "That is the chance that one product B_ik A_kj is not zero; ΔW_ij is a sum of r of them.": lambda r, a, b: (1 - a) * (1 - b),
    "The chances of the r products do not add up: several of them may be non-zero at once.":
        lambda r, a, b: min(1, r * (1 - a) * (1 - b)),
    "A product is zero if either factor is masked, not only if both are.": lambda r, a, b: 1 - (a * b) ** r,
    "That is the share of zeros; the share that is not zero is asked for.": lambda r, a, b: (1 - (1 - a) * (1 - b)) ** r,
    "B is masked too: a product is zero if either factor is.": lambda r, a, b: 1 - a**r,
    "A is masked too: a product is zero if either factor is.": lambda r, a, b: 1 - b**r,
    "That is the chance that all r products are not zero; one is enough.": lambda r, a, b: ((1 - a) * (1 - b)) ** r,
    "Sparsity is the share that is masked, not the share that is left.": lambda r, a, b: 1 - (1 - a * b) ** r,
    "This is the density of the factors.": lambda r, a, b: (2 - a - b) / 2,
    "The chance that either is masked is not the sum of both: they may both be.": lambda r, a, b: 1 - min(1, a + b) ** r,
}  # fmt: skip


@exercise(
    "4.1-b",
    right=density,
    mistakes=DENSITY_MISTAKES,
    otherwise="This is not the chance that at least one of the r products is not zero.",
)
def check_density(draw: Draw):
    """The expected share of entries of ΔW = B A that are not zero."""
    for _ in range(3):
        yield case(draw.integer(2, 5), draw.number(0.3, 0.9), draw.number(0.3, 0.9))
    yield case(1, draw.number(0.2, 0.8), draw.number(0.2, 0.8), hint="With rank 1 it goes wrong.")
    yield case(
        draw.integer(2, 4), 0.0, draw.number(0.4, 0.9), hint="Where A is not masked it goes wrong."
    )
    yield case(
        draw.integer(2, 4), draw.number(0.4, 0.9), 0.0, hint="Where B is not masked it goes wrong."
    )
    yield case(3, 0.0, 0.0, hint="Where nothing is masked it goes wrong: every entry is there.")
    yield case(4, 1.0, draw.number(0.1, 0.9), hint="Where all of A is masked it goes wrong: 0.")
    yield case(draw.integer(16, 64), draw.number(0.9, 0.97), draw.number(0.9, 0.97), hint="With a large rank it goes wrong.")  # fmt: skip
