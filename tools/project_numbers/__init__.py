"""The numbers in the texts of book/_data/projects.yml, by chapter, each read from the studies' records: a room for each part of the course."""

from collections.abc import Callable
from typing import Any

from tools.project_numbers.applications import fifth_domain, stages
from tools.project_numbers.optimisation import codebook, other_zero, parameters_kept
from tools.project_numbers.outlook import components, fused_more, gates, last_block
from tools.project_numbers.pairs import Pair
from tools.project_numbers.research import chance, labels, scale

__all__ = ["NUMBERS", "Pair"]

NUMBERS: dict[str, Callable[[], dict[str, Any]]] = {
    "0.1": other_zero, "1.1": codebook, "1.2": parameters_kept, "2.1": fifth_domain, "2.2": stages, "3.1": chance,
    "3.2": labels, "3.3": scale, "4.1": gates, "4.2": last_block, "4.3": components, "4.4": fused_more,
}  # fmt: skip
