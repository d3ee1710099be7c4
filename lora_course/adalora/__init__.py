"""AdaLoRA: a budget of rank for the whole model, moved during training to where the loss needs it.

    y = W₀ x + b + s · B diag(λ) A x,     A ∈ R^{r×in},  λ ∈ R^r,  B ∈ R^{out×r},  s = α/r

The i-th row of `A`, λᵢ and the i-th column of `B` are a triplet, as of a singular value decomposition. Triplets of all
layers compete by their importance; those that lose have λ set to zero.

Source: arXiv 2303.10512, where A is called Q, λ is Λ, B is P. Names, configuration and numbers are PEFT's.

    inject(model, AdaLoraConfig(init_r=12, target_r=8, total_step=1000, …), layer=AdaLoRALinear)
    allocator = RankAllocator(model)
    AdapterTrainer(model, args, callbacks=[allocator], auxiliary_loss=regularizer, …).train()
    export_peft(prune_triplets(model), "adapter")                       # a plain LoRA adapter, smaller, of the same function
"""

from lora_course.adalora.allocator import RankAllocator, kept_triplets, prune_triplets
from lora_course.adalora.layer import AdaLoRALinear, regularizer

__all__ = ["AdaLoRALinear", "RankAllocator", "kept_triplets", "prune_triplets", "regularizer"]
