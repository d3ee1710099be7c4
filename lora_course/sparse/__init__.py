"""Sparse LoRA: gates that switch ranks off and are then pruned, and masks that fix beforehand which numbers are trained.

    gates      ΔW = s · B diag(g) A,  after each step  g ← sign(g) · max(|g| − η λ, 0)       SoRA, arXiv 2311.11696
    factors    ΔW = s · (M_B ∘ B) (M_A ∘ A)                                                  masks drawn once
    ΔW         ΔW = s · (M ∘ V),  M ∈ {0, 1}^{out×in} with r · (in + out) ones              SHiRA, arXiv 2406.13175

What is masked is not stored: a matrix M ∘ X is its `values` [nnz], which are trained, and their `indices` [nnz], a buffer. So
parameters and optimiser state shrink with the mask, weight decay has nothing to decay, and a place that is masked has no
number that could move. Entries are numbered along rows: entry (i, j) of a matrix with n columns has the index i · n + j.

    inject(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), layer=GatedLoRALinear)
    AdapterTrainer(model, args, callbacks=[GateSparsity(model, penalty=2.0)], …).train()
    export_peft(prune_gates(model), "adapter")                       # a plain LoRA adapter, smaller, of the same function

    inject(model, LoraConfig(r=8, …), layer=SparseLoRALinear, sparsity=0.5)
    inject(model, LoraConfig(r=2, …), layer=SparseDeltaLinear)
"""

from lora_course.sparse.gates import (
    GatedLoRALinear,
    GateSparsity,
    open_gates,
    prune_gates,
    soft_threshold,
)
from lora_course.sparse.masks import (
    MaskedLinear,
    SparseDeltaLinear,
    SparseLoRALinear,
    random_places,
    scatter,
)
from lora_course.sparse.product import Places, SparseProduct

__all__ = [
    "GateSparsity",
    "GatedLoRALinear",
    "MaskedLinear",
    "Places",
    "SparseDeltaLinear",
    "SparseLoRALinear",
    "SparseProduct",
    "open_gates",
    "prune_gates",
    "random_places",
    "scatter",
    "soft_threshold",
]
