"""The layer: an update in the form of a singular value decomposition, and the loss that keeps it one."""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig
from torch import Tensor, nn

from lora_course.injection import adapter_layers, injection_of, layers_of
from lora_course.linears import gathered
from lora_course.lora import AdapterState, LoRALinear, register


@register
class AdaLoRALinear(LoRALinear):
    """A frozen linear layer plus an update in the form of an SVD: `y = base(x) + scaling · B (λ ∘ (A dropout(x)))`.

    λ starts at zero, `A` and `B` normal with deviation 0.02: the layer starts as the base layer and λ learns first.
    Arguments are those of `LoRALinear`; `inject` takes `r` from `AdaLoraConfig.init_r`.

    Attributes:
        A: `[r, in]`.    E: λ, `[r, 1]`.    B: `[out, r]`.    All fp32.
        scaling: α/init_r, whatever is masked or pruned later.
        mask: `[r]` bool; the triplets that the last allocation kept.
        sensitivity_A, uncertainty_A, and so for E and B: moving averages of the shape of the parameter (see
            `RankAllocator`); empty from the last allocation on. They are saved and loaded with the adapter.

    Raises:
        ValueError: an initialisation other than AdaLoRA's own, and as `LoRALinear`.
    """

    supported_fields = LoRALinear.supported_fields - {"use_rslora", "rank_pattern"} | {
        "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
    }  # fmt: skip

    mask: Tensor

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        *,
        init_lora_weights: bool | str = True,
        **fields: Any,
    ) -> None:
        if init_lora_weights is not True:
            raise ValueError(
                f"init_lora_weights={init_lora_weights!r}: AdaLoRA has one start, λ zero with A and B normal; leave it at True."
            )
        super().__init__(base_layer, r, lora_alpha, **fields)
        nn.init.normal_(self.A, std=0.02)
        nn.init.normal_(self.B, std=0.02)
        self.E = nn.Parameter(torch.zeros(r, 1, device=self.A.device))
        self.register_buffer("mask", torch.ones(r, dtype=torch.bool, device=self.A.device))
        for name in "AEB":
            self.register_buffer(
                f"sensitivity_{name}", torch.zeros_like(getattr(self, name), requires_grad=False)
            )
            self.register_buffer(
                f"uncertainty_{name}", torch.zeros_like(getattr(self, name), requires_grad=False)
            )

    @classmethod
    def initial_rank(cls, config: LoraConfig) -> int:
        """`config.init_r`, once the budget can shrink and the schedule has room for it.

        Raises:
            TypeError: no `AdaLoraConfig`.    ValueError: a budget or schedule under which nothing could be allocated.
        """
        if not isinstance(config, AdaLoraConfig):
            raise TypeError(
                f"AdaLoRALinear needs peft.AdaLoraConfig(init_r=…, target_r=…, total_step=…), not a {type(config).__name__}."
            )
        c = config
        if c.r != type(c).r:
            raise ValueError(
                f"r={c.r}: AdaLoRA starts every layer with init_r={c.init_r} triplets and does not read r. Set init_r."
            )
        if not 1 <= c.target_r < c.init_r:
            raise ValueError(
                f"init_r={c.init_r}, target_r={c.target_r}: the budget shrinks from init_r to target_r triplets a layer, so "
                f"1 <= target_r < init_r is expected. For an average rank of {c.target_r}, start with init_r={max(2, c.target_r * 3 // 2)}."
            )
        total = c.total_step or 0
        if c.tinit < 0 or c.tfinal < 0 or c.deltaT < 1 or c.tinit >= total - c.tfinal:
            raise ValueError(
                f"tinit={c.tinit}, tfinal={c.tfinal}, deltaT={c.deltaT}, total_step={c.total_step}: no step is left between "
                "warm-up and final phase. Expected: 0 <= tinit < total_step - tfinal, tfinal >= 0, deltaT >= 1; "
                f"for {total} steps try tinit={total // 10}, tfinal={total // 3}."
            )
        if not (0 < c.beta1 < 1 and 0 < c.beta2 < 1):
            raise ValueError(
                f"beta1={c.beta1}, beta2={c.beta2}: weights of moving averages, in (0, 1); the paper has 0.85 for both."
            )
        return c.init_r

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """`(diag(λ) A, B, scaling)`: the plain LoRA layer that computes the same update."""
        return self.A * self.E, self.B, self.scaling

    def scores(self) -> Tensor:
        """Importance of each triplet, `[r]`: s(λ) + mean s(its row of A) + mean s(its column of B), s = sensitivity · uncertainty."""
        s = {
            name: getattr(self, f"sensitivity_{name}") * getattr(self, f"uncertainty_{name}")
            for name in "AEB"
        }
        return s["E"].flatten() + s["A"].mean(1) + s["B"].mean(0)

    def forget(self) -> None:
        """Empty the moving averages: after the last allocation nothing is scored any more."""
        for name in "AEB":
            setattr(self, f"sensitivity_{name}", self.A.new_empty(0))
            setattr(self, f"uncertainty_{name}", self.A.new_empty(0))

    def check_tensors(self, name: str, tensors: AdapterState) -> None:
        super().check_tensors(name, tensors)
        r = tensors["A"].shape[0]
        if tensors["E"].shape != (r, 1) or tensors["mask"].shape != (r,):
            raise ValueError(
                f"The adapter's λ for {name!r} is {list(tensors['E'].shape)}; [{r}, 1] is expected beside its A."
            )


def config_of(model: nn.Module) -> AdaLoraConfig:
    """The configuration that `model` was injected with, `total_step` included."""
    layers_of(model, AdaLoRALinear)
    config = injection_of(model).config
    assert isinstance(config, AdaLoraConfig)  # initial_rank takes no other
    return config


def regularizer(model: nn.Module) -> Tensor:
    """How far the factors are from those of an SVD, times `orth_reg_weight`; add it to the loss of every step.

    R = weight · mean over the model's A and B of ‖A Aᵀ − I‖_F and ‖Bᵀ B − I‖_F. It is 0 if and only if all rows of each A and
    all columns of each B are orthonormal. (The paper squares the norms and sums them; its code, PEFT and this do not.)
    """
    config = config_of(model)
    alike: dict[
        tuple[torch.Size, torch.device], list[Tensor]
    ] = {}  # factors of one shape are one stack: few large operations
    for layer in adapter_layers(model).values():
        for rows in (gathered(layer.A), gathered(layer.B).T):
            alike.setdefault((rows.shape, rows.device), []).append(rows)
    norms = []
    for (shape, device), factors in alike.items():
        with torch.autocast(device.type, enabled=False):
            rows = torch.stack(factors)
            norms.append(
                torch.linalg.vector_norm(
                    rows @ rows.mT - torch.eye(shape[0], device=device), dim=(1, 2)
                )
            )
    return config.orth_reg_weight * torch.cat([norm.to(norms[0].device) for norm in norms]).mean()
