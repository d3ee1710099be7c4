"""Adaptive rank growth: start small, and give rank to the layers that turn out to matter while training goes on.

    ΔW = s · (B₀ A₀ + B₁ A₁ + … + B_K A_K),     s = α / r₀ for good;     a new A_k is random, a new B_k zero

A growth adds one pair to a layer. As B_k A_k = 0, the function is what it was; as A_k ≠ 0, the pair learns
(∂L/∂B_k = s · ∂L/∂y (A_k x)ᵀ). Dividing by the new rank, as α/r invites to, would shrink what was learnt by r/(r + k).

A pair is two tensors of its own. Old tensors, and what an optimiser keeps for them, are not touched by a bit; new ones
begin with no moments and a step count of 0. One larger tensor would share the old step count, and its state would have
to be cut and sewn, which that of 8-bit optimisers (blocks of 256, another type below 4,096 numbers) is not made for.

Where to grow follows IncreLoRA, arXiv 2308.12043: every so many steps the top few layers gain rank, by the smoothed
sensitivity of the *layer* times its uncertainty. Unlike its code, the scale is held, the budget is met exactly, and the
sensitivity comes from the factors' gradients, so that no `[out, in]` matrix is formed.

    inject(model, LoraConfig(r=2, lora_alpha=4, …), layer=GrowingLoRALinear)
    grower = RankGrower(model, GrowthSchedule(budget=8 * layers, start=50, every=10, top=8, max_r=16))
    AdapterTrainer(model, args, callbacks=[grower], …).train()

or, in a loop, `backward(); grower.observe(); optimizer.step(); grower.grow(optimizer, step); optimizer.zero_grad()`.
"""

from lora_course.adaptive.growth import GrowthSchedule, RankGrower, add_to_optimizer, rank_history
from lora_course.adaptive.layer import GrowingLoRALinear

__all__ = ["GrowingLoRALinear", "GrowthSchedule", "RankGrower", "add_to_optimizer", "rank_history"]
