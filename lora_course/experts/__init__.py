"""Several LoRA adapters on one base, mixed by a trained router: one base pass and two products, whatever their number.

    y = W₀ x + b + s · Σ_e g_e B_e A_e x = W₀ x + b + s · B (g ∘ A x),   g = softmax(W_g h / ‖h‖),   Σ_e g_e = 1

All experts of a layer lie in one pair, `A` `[Σ r_e, in]` and `B` `[out, Σ r_e]`; a gate multiplies its expert's part of `A x`.
A *router* computes the gates from the hidden state h that enters its decoder block (one router a block, shared by the
block's layers), or from the embedding that enters the first one (one router for the model): by token, or once a
sequence, from the sequence's first tokens.

Sources: mixtures of LoRA experts, arXiv 2402.07148 (X-LoRA), 2312.09979 (LoRAMoE), 2404.15159 (MixLoRA); the balance
loss, arXiv 2101.03961 (Switch Transformers).
"""

from lora_course.experts.layer import ExpertsLinear, GateExperts, repeat_gates
from lora_course.experts.mixing import (
    balance_loss,
    expert_state,
    fixed_gates,
    freeze_experts,
    latest_gates,
    mask_prefix,
    mix_experts,
)
from lora_course.experts.router import CurrentForward, PrefixSums, Router

__all__ = [
    "CurrentForward",
    "ExpertsLinear",
    "GateExperts",
    "PrefixSums",
    "Router",
    "balance_loss",
    "expert_state",
    "fixed_gates",
    "freeze_experts",
    "latest_gates",
    "mask_prefix",
    "mix_experts",
    "repeat_gates",
]
