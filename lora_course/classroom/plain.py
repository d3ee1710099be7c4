"""A formula's text without TeX, for messages, which are read in a terminal or a table and rendered by nothing."""

import re

_SIGNS = {
    "alpha": "α", "tau": "τ", "phi": "φ", "pi": "π", "partial": "∂", "pm": "±", "cdot": "·", "sqrt": "√", "cos": "cos",
    "langle": "⟨", "rangle": "⟩", "lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉", "|": "‖", ",": "",
}  # fmt: skip


def plain(text: str) -> str:
    r""" "a norm of $\sqrt{2n}$" → "a norm of √(2n)". Raises KeyError for a command that it doesn't know."""
    return re.sub(r"\$([^$]*)\$", lambda found: _formula(found[1]), text)


def _formula(tex: str) -> str:
    tex = re.sub(r"\\mathrm\{(\w+)\}", r"\1", tex)
    tex = re.sub(r"\\(\w+|[|,])", lambda found: _SIGNS[found[1]], tex)
    tex = tex.replace("{", "(").replace("}", ")")
    return re.sub(r"(?<=[⟨⌊⌈√]) | (?=[⟩⌋⌉,])", "", tex)
