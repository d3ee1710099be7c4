"""Progressive LoRA: training in stages, each with fresh factors on top of what the earlier ones left.

    W_k = W₀ + s Σ_{j<k} B_j A_j        (frozen)          y = W_k x + b + s B_k A_k x        (B_k = 0 at its start)

Two ways to keep the earlier stages. **Stack**: beside the base, as factors that no longer train. **Merge-and-restart**:
inside the base weight. Both compute the same function, both keep the factors, and both are in the end *one* LoRA
adapter of rank Σ r_k, since Σ B_j A_j = [B_0 … B_k] [A_0; …; A_k]. The scale s = α/r is one for all stages, whatever
their ranks.

Sources: ReLoRA, arXiv 2307.05695 (merge, fresh factors, moments partly reset, here cleared, learning rate re-warmed from 0);
Chain of LoRA, arXiv 2401.04151 (the same as a sequence of residual problems).
"""

from lora_course.progressive.layer import StackedLoRALinear
from lora_course.progressive.stages import (
    Stage,
    begin_stage,
    effective_rank,
    inject_stages,
    singular_values,
    stage_states,
)
from lora_course.progressive.trainer import (
    SET_BY_STAGES,
    Mode,
    Schedule,
    StageTrainer,
    load_stage,
    multiplier,
    train_stages,
)

__all__ = [
    "Mode",
    "SET_BY_STAGES",
    "Schedule",
    "StackedLoRALinear",
    "Stage",
    "StageTrainer",
    "begin_stage",
    "effective_rank",
    "inject_stages",
    "load_stage",
    "multiplier",
    "singular_values",
    "stage_states",
    "train_stages",
]
