"""`lora_course.classroom.plain`: formulas in messages, which nothing renders."""

import pytest

from lora_course.classroom.plain import plain


def test_a_formula_in_a_message_keeps_its_meaning() -> None:
    assert plain(r"By $\sqrt{in \cdot out}$, or $\lfloor u \rfloor$.") == "By √(in · out), or ⌊u⌋."
    assert plain(r"$\mathrm{KL}(p\,\|\,q)$ costs 3") == "KL(p‖q) costs 3"
    with pytest.raises(KeyError, match="frac"):
        plain(r"$\frac{1}{2}$")
