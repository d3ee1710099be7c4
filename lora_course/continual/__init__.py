"""Continual learning: tasks one after another, and what is left of the first when the last is done.

    R[i, j] = score on task j after i tasks, i = 0 … T, j = 1 … T            row 0: before any task
    ACC = 1/T Σⱼ R[T, j]        BWT = 1/(T−1) Σ_{j<T} (R[T, j] − R[j, j])        FWT = 1/(T−1) Σ_{j>1} (R[j−1, j] − R[0, j])

Source of the three: GEM, arXiv 1706.08840; its b̄, the score of an untrained model, is row 0 here. They are
written for scores of which more is better. `metrics` turns the signs of BWT and FWT for scores of which less
is better, such as bits a byte or the loss: a negative BWT is forgetting either way. ACC stays what it is, the
mean score.

`learn` takes the tasks through one strategy: `Sequential` (one adapter trained on and on), `Replay` (with
rows of earlier tasks mixed in), `Orthogonal` (O-LoRA: earlier adapters frozen, the new one pushed into
another subspace), `Isolated` (one adapter a task). It can be killed at any time; the same call goes on where
it was.
"""

from lora_course.continual.learning import (
    Results,
    Task,
    learn,
    load_results,
    metrics,
    score_task,
)
from lora_course.continual.memory import Interleaved, Reservoir, Rows
from lora_course.continual.orthogonal import OrthogonalLoRALinear, overlap
from lora_course.continual.scoring import mean_loss
from lora_course.continual.strategies import Isolated, Orthogonal, Replay, Sequential, restart

__all__ = [
    "Interleaved",
    "Isolated",
    "Orthogonal",
    "OrthogonalLoRALinear",
    "Replay",
    "Reservoir",
    "Results",
    "Rows",
    "Sequential",
    "Task",
    "learn",
    "load_results",
    "mean_loss",
    "metrics",
    "overlap",
    "restart",
    "score_task",
]
