"""AdaLoRA: a budget of rank for the whole model, moved during training to where the loss needs it.

    y = W₀ x + b + s · B diag(λ) A x,     A ∈ R^{r×in},  λ ∈ R^r,  B ∈ R^{out×r},  s = α/r

The i-th row of `A`, λᵢ and the i-th column of `B` are a triplet, as of a singular value decomposition. Triplets of all
layers compete by their importance; those that lose have λ set to zero.

Source: arXiv 2303.10512, where A is called Q, λ is Λ, B is P. Names, configuration and numbers are PEFT's.

    inject(model, AdaLoraConfig(init_r=12, target_r=8, total_step=1000, …), layer=AdaLoRALinear)
    allocator = RankAllocator(model)
    AdapterTrainer(model, args, callbacks=[allocator], auxiliary_loss=regularizer, …).train()
    export_peft(prune(model), "adapter")                       # a plain LoRA adapter, smaller, of the same function
"""

from __future__ import annotations

import torch
from peft import AdaLoraConfig, LoraConfig
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_course.injection import adapter_layers, check_same_model, injection_of, layers_of
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

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> None:
        if init_lora_weights is not True:
            raise ValueError(
                f"init_lora_weights={init_lora_weights!r}: AdaLoRA has one start, λ zero with A and B normal; leave it at True."
            )
        super().__init__(base_layer, r, lora_alpha, lora_dropout, use_rslora)
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
        if c.tinit < 0 or c.tfinal < 0 or c.deltaT < 1 or c.tinit >= c.total_step - c.tfinal:
            raise ValueError(
                f"tinit={c.tinit}, tfinal={c.tfinal}, deltaT={c.deltaT}, total_step={c.total_step}: no step is left between "
                "warm-up and final phase. Expected: 0 <= tinit < total_step - tfinal, tfinal >= 0, deltaT >= 1; "
                f"for {c.total_step} steps try tinit={c.total_step // 10}, tfinal={c.total_step // 3}."
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


def regularizer(model: nn.Module) -> Tensor:
    """How far the factors are from those of an SVD, times `orth_reg_weight`; add it to the loss of every step.

    R = weight · mean over the model's A and B of ‖A Aᵀ − I‖_F and ‖Bᵀ B − I‖_F. It is 0 if and only if all rows of each A and
    all columns of each B are orthonormal. (The paper squares the norms and sums them; its code, PEFT and this do not.)
    """
    config = _config(model)
    alike: dict[
        tuple[torch.Size, torch.device], list[Tensor]
    ] = {}  # factors of one shape are one stack: few large operations
    for layer in adapter_layers(model).values():
        for rows in (layer.A, layer.B.T):
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


class RankAllocator(TrainerCallback):
    """Scores the triplets of a model after each step, and shrinks the number that is kept from init_r to target_r a layer.

    With w a weight, g its gradient, I = |w g|:

        Ī ← β₁ Ī + (1 − β₁) I  (sensitivity),    Ū ← β₂ Ū + (1 − β₂) |I − Ī|  (uncertainty),    s(w) = Ī Ū
        b(t) = b₁ + (b₀ − b₁) (1 − (t − tinit) / (total_step − tfinal − tinit))³     triplets in all layers together

    Step t = 1 … tinit: scores only. Until total_step − tfinal: scores, and at each t divisible by deltaT the b(t) triplets of
    highest score keep their λ, while the others' is set to zero; they may come back at the next allocation. At
    t = total_step − tfinal the last choice is made: exactly b₁ = target_r · layers. From then on it is held, without scores.

    In a loop: `optimizer.step(); allocator.step(t); optimizer.zero_grad()`, t from 1 on. With a Trainer:
    `callbacks=[allocator]`, which does the same. All state is in the layers, so that a resumed run goes on as it was.

    Args:
        model: injected with `AdaLoRALinear`.

    Raises:
        ValueError: a model without AdaLoRA layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.config = _config(model)
        self.model, self.layers = model, adapter_layers(model)
        self.final = self.config.total_step - self.config.tfinal
        self.target = self.config.target_r * len(self.layers)

    def budget(self, t: int) -> int:
        """b(t): how many triplets are kept after step t, in all layers together."""
        c, initial = self.config, self.config.init_r * len(self.layers)
        left = 1 - (min(max(t, c.tinit), self.final) - c.tinit) / (self.final - c.tinit)
        return int((initial - self.target) * left**3 + self.target)

    @torch.no_grad()
    def step(self, t: int) -> dict[str, int] | None:
        """To be called after the optimiser's step t (the first is 1) and before the gradients are cleared.

        Returns:
            Where the budget was allocated at this step, the ranks by module; else None.

        Raises:
            ValueError: t < 1.    RuntimeError: there are no gradients, or no scores when they are needed.
        """
        if t < 1:
            raise ValueError(f"t={t}: steps are counted from 1, the optimiser's first.")
        if t < self.final:
            self._observe()
        chosen = None
        late = t > self.final and sum(ranks(self.model).values()) > self.target
        if (
            t == self.final
            or late
            or (self.config.tinit < t < self.final and t % self.config.deltaT == 0)
        ):
            chosen = self._allocate(self.budget(t))
        if t >= self.final:
            for layer in self.layers.values():
                layer.E.masked_fill_(~layer.mask[:, None], 0.0)
                if chosen:
                    layer.forget()
        return chosen

    def _observe(self) -> None:
        """One update of the moving averages."""
        owners = [(layer, name) for layer in self.layers.values() for name in "AEB"]
        weights = [getattr(layer, name) for layer, name in owners]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if len(gradients) < len(weights) or norm == 0:
            raise RuntimeError(
                "Importance is |weight · gradient|, and there are no gradients: call step(t) after backward() and before "
                "zero_grad(). A layer that takes no part in the loss belongs in exclude_modules."
            )
        if (
            not norm.isfinite()
        ):  # an overflow in fp16: such a step is skipped by the optimiser, and by us
            return
        sensitivity = [getattr(layer, f"sensitivity_{name}") for layer, name in owners]
        uncertainty = [getattr(layer, f"uncertainty_{name}") for layer, name in owners]
        importance = torch._foreach_mul(weights, gradients)
        torch._foreach_abs_(importance)
        torch._foreach_lerp_(sensitivity, importance, 1 - self.config.beta1)
        torch._foreach_sub_(importance, sensitivity)
        torch._foreach_abs_(importance)
        torch._foreach_lerp_(uncertainty, importance, 1 - self.config.beta2)

    def _allocate(self, budget: int) -> dict[str, int]:
        """Keeps the λ of the `budget` best triplets of all layers and sets the others to zero. Among equals the first win."""
        scores = [layer.scores() for layer in self.layers.values()]
        together = torch.cat([score.to(scores[0].device) for score in scores])
        if not together.any():
            raise RuntimeError(
                "The budget is due and no step has been scored: call step(t) for every t from 1 on."
            )
        keep = torch.zeros_like(together, dtype=torch.bool)
        keep[together.argsort(descending=True, stable=True)[:budget]] = True
        for layer, part in zip(
            self.layers.values(),
            keep.split([layer.r for layer in self.layers.values()]),
            strict=True,
        ):
            layer.mask.copy_(part)
            layer.E.masked_fill_(~layer.mask[:, None], 0.0)
        return ranks(self.model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **_: object,
    ) -> None:
        """Raises ValueError for another model than the allocator's, or a run shorter than the schedule."""
        check_same_model(self, model, self.model)
        if state.max_steps < self.config.total_step:
            raise ValueError(
                f"The run has {state.max_steps} steps and the schedule total_step={self.config.total_step}, so the budget "
                f"would not be reached: set total_step={state.max_steps} in AdaLoraConfig, or train longer."
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """`step`, at the one point where the weights are new and the gradients still there; ranks go into the trainer's log."""
        if chosen := self.step(state.global_step + 1):
            state.log_history.append({"step": state.global_step + 1, "ranks": chosen})


def ranks(model: nn.Module) -> dict[str, int]:
    """How many triplets each module keeps."""
    _config(model)
    return {name: int(layer.mask.sum()) for name, layer in adapter_layers(model).items()}


@torch.no_grad()
def prune(model: nn.Module) -> nn.Module:
    """Take the masked triplets out for good, in place: fewer parameters, the same function; a layer may end with rank 0.

    The parameters are new ones, so an optimiser that knew the old ones has to be made anew. `export_peft` then writes a
    plain LoRA adapter of these ranks.

    Raises:
        ValueError: more triplets are left than the target, or a masked one is in use. Nothing is changed then.
    """
    config, layers = _config(model), adapter_layers(model)
    kept, target = sum(ranks(model).values()), config.target_r * len(layers)
    if kept > target:
        raise ValueError(
            f"{kept} triplets are kept and the target is {target}: the allocation has not run, or not to step "
            f"{config.total_step - config.tfinal}. Train with callbacks=[RankAllocator(model)], or call its step(t) after each step."
        )
    if any(layer.E[~layer.mask].any() for layer in layers.values()):
        raise ValueError(
            "A masked λ is not zero: a step was taken without the allocator. Call allocator.step(t) after every step."
        )
    for layer in layers.values():
        keep = layer.mask
        layer.load_tensors(
            layer.tensors()
            | {"A": layer.A[keep], "E": layer.E[keep], "B": layer.B[:, keep], "mask": keep[keep]}
        )
    return model


def _config(model: nn.Module) -> AdaLoraConfig:
    layers_of(model, AdaLoRALinear)
    return injection_of(model).config
