"""Sparse LoRA: gates that switch ranks off and are then pruned, and masks that fix beforehand which numbers are trained.

    gates      ΔW = s · B diag(g) A,  after each step  g ← sign(g) · max(|g| − η λ, 0)       SoRA, arXiv 2311.11696
    factors    ΔW = s · (M_B ∘ B) (M_A ∘ A)                                                  masks drawn once
    ΔW         ΔW = s · (M ∘ V),  M ∈ {0, 1}^{out×in} with r · (in + out) ones              SHiRA, arXiv 2406.13175

What is masked is not stored: a matrix M ∘ X is its `values` [nnz], which are trained, and their `indices` [nnz], a buffer. So
parameters and optimiser state shrink with the mask, weight decay has nothing to decay, and a place that is masked has no
number that could move. Entries are numbered along rows: entry (i, j) of a matrix with n columns has the index i · n + j.

    inject(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), layer=GatedLoRALinear)
    AdapterTrainer(model, args, callbacks=[GateSparsity(model, penalty=2.0)], …).train()
    export_peft(prune(model), "adapter")                       # a plain LoRA adapter, smaller, of the same function

    inject(model, LoraConfig(r=8, …), layer=SparseLoRALinear, sparsity=0.5)
    inject(model, LoraConfig(r=2, …), layer=SparseDeltaLinear)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_course.injection import check_same_model, layers_of
from lora_course.linears import is_4bit
from lora_course.lora import AdapterState, LoRALinear, register, update_dtype

# --------------------------------------------------------------------------------------------------- gates


@register
class GatedLoRALinear(LoRALinear):
    """A frozen linear layer plus a gated update: `y = base(x) + scaling · B (g ∘ (A dropout(x)))`.

    A rank whose gate is zero takes no part. Its row of `A` and column of `B` then get no gradient; its gate does, so that it
    can open again. Arguments are those of `LoRALinear`, and:

    Args:
        gate_init: "normal" (standard normal, as in the code of arXiv 2311.11696) or "ones" (the layer starts as plain LoRA).

    Attributes:
        A: `[r, in]`.    gate: g, `[r]`.    B: `[out, r]`.    All fp32.
        scaling: s = α/r of the injection, whatever is pruned later.

    Raises:
        ValueError: another `gate_init`, and as `LoRALinear`.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        gate_init: str = "normal",
    ) -> None:
        if gate_init not in ("normal", "ones"):
            raise ValueError(f"gate_init={gate_init!r}: 'normal' or 'ones' is expected.")
        super().__init__(base_layer, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
        gate = torch.ones if gate_init == "ones" else torch.randn
        self.gate = nn.Parameter(gate(r, device=self.A.device))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """`(diag(g) A, B, scaling)`: the plain LoRA layer that computes the same update."""
        return self.gate[:, None] * self.A, self.B, self.scaling

    def check_tensors(self, name: str, tensors: AdapterState) -> None:
        super().check_tensors(name, tensors)
        r = tensors["A"].shape[0]
        if tensors["gate"].shape != (r,):
            raise ValueError(
                f"The adapter's gate for {name!r} is {list(tensors['gate'].shape)}; [{r}] is expected beside its A."
            )


class GateSparsity(TrainerCallback):
    """Soft-thresholds the gates after each optimiser step: one step of proximal gradient descent on L + λ Σ|g|.

        g ← sign(g) · max(|g| − η λ, 0),      η: the learning rate of this step

    With Adam one step moves a gate by no more than about η. So λ is compared with a number of about 1, whatever the size of
    the gradient: λ ≪ 1 takes gates whose gradient has no steady sign, and from λ ≈ 1 on every gate goes, sooner or later.

    In a loop: `optimizer.step(); sparsity.step(optimizer, t)`, t from 1 on. With a Trainer: `callbacks=[sparsity]`, which does
    the same. There is no state, so a resumed run goes on as it was.

    Args:
        model: injected with `GatedLoRALinear`.
        penalty: λ ≥ 0, or a function of the step t that gives it, such as a ramp.

    Raises:
        ValueError: a model without gates, a penalty that is negative or no number.
    """

    def __init__(self, model: nn.Module, penalty: float | Callable[[int], float]) -> None:
        layers_of(model, GatedLoRALinear)
        self.model, self.penalty = model, penalty
        self.penalty_at(1)

    def penalty_at(self, t: int) -> float:
        """λ at step t."""
        value = self.penalty(t) if callable(self.penalty) else self.penalty
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(
                f"penalty={value!r} at step {t}: λ must be a finite number of 0 or more."
            )
        return value

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, t: int = 1) -> int:
        """To be called after the optimiser's step t. Returns how many gates are open, in the whole model.

        A step that the optimiser skipped, after an overflow in fp16, is skipped here too.

        Raises:
            ValueError: the gates are not among the optimiser's parameters.
        """
        layers = layers_of(self.model, GatedLoRALinear)
        rates = {
            id(parameter): group["lr"]
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        if missing := [name for name, layer in layers.items() if id(layer.gate) not in rates]:
            raise ValueError(
                f"The optimiser does not train the gate of {missing[0]!r} ({len(missing)} in all): make it from the parameters of "
                "this model, and anew after prune(model)."
            )
        if not getattr(optimizer, "step_was_skipped", False):
            for layer in layers.values():
                layer.gate.copy_(
                    soft_threshold(layer.gate, float(rates[id(layer.gate)]) * self.penalty_at(t))
                )
        return sum(ranks(self.model).values())

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **_: object,
    ) -> None:
        """Raises ValueError for another model than this callback's."""
        check_same_model(self, model, self.model)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer,
        **_: object,
    ) -> None:
        """`step`, right after the optimiser's and before the scheduler changes the rate."""
        self.step(optimizer, state.global_step + 1)


def soft_threshold(x: Tensor, threshold: float) -> Tensor:
    """sign(x) · max(|x| − threshold, 0), elementwise: the proximal operator of threshold · |x|. Zeros are exact."""
    return F.softshrink(x, threshold)


def ranks(model: nn.Module) -> dict[str, int]:
    """How many gates are open in each module."""
    layers = layers_of(model, GatedLoRALinear)
    counts = torch.stack([(layer.gate != 0).sum().cpu() for layer in layers.values()])
    return dict(zip(layers, counts.tolist(), strict=True))


@torch.no_grad()
def prune(model: nn.Module) -> nn.Module:
    """Take the ranks out whose gate is zero, in place: fewer parameters, the same function; a layer may end with rank 0.

    The parameters are new ones, so an optimiser that knew the old ones has to be made anew. `export_peft` then writes a
    plain LoRA adapter of these ranks.
    """
    for layer in layers_of(model, GatedLoRALinear).values():
        keep = layer.gate != 0
        layer.load_tensors(
            layer.tensors() | {"A": layer.A[keep], "gate": layer.gate[keep], "B": layer.B[:, keep]}
        )
    return model


# --------------------------------------------------------------------------------------------------- masks


class MaskedLinear(LoRALinear):
    """What the two masked layers share: matrices of which only the entries at fixed places exist.

    Matrix X is kept as `values_X` `[nnz]`, trained, fp32, and `indices_X` `[nnz]`, int32, ascending: a buffer, so that it is saved,
    loaded and moved with the layer, and is no parameter.
    """

    def keep(self, name: str, matrix: Tensor, indices: Tensor) -> None:
        """Register the entries of `matrix` `[m, n]` at `indices` `[nnz]` as `values_<name>` and `indices_<name>`."""
        indices = indices.sort().values
        self.register_parameter(f"values_{name}", nn.Parameter(matrix.detach().flatten()[indices]))
        self.register_buffer(f"indices_{name}", indices.int())

    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape of each masked matrix by its name."""
        raise NotImplementedError

    def matrix(self, name: str) -> Tensor:
        """The whole matrix, zero where it is masked."""
        return scatter(
            getattr(self, f"values_{name}"), getattr(self, f"indices_{name}"), self.shapes()[name]
        )

    def mask(self, name: str) -> Tensor:
        """The mask as a bool matrix: True where a number is trained."""
        indices = getattr(self, f"indices_{name}")
        return scatter(torch.ones_like(indices, dtype=torch.bool), indices, self.shapes()[name])

    @torch.no_grad()
    def load_tensors(self, tensors: AdapterState) -> None:
        """Take over values and masks that `tensors()` of such a layer gave."""
        for name, new in tensors.items():
            if name != "scaling":
                getattr(self, name).copy_(new)
        self.scaling = float(tensors["scaling"])
        self.lora_alpha = self.scaling * (math.sqrt(self.r) if self.use_rslora else self.r)

    def check_tensors(self, name: str, tensors: AdapterState) -> None:
        own = self.tensors()
        if set(tensors) != set(own):
            raise ValueError(
                f"The adapter holds {sorted(tensors)} for {name!r}, a {type(self).__name__} keeps {sorted(own)}: "
                "it was made with another kind of layer. Inject that layer."
            )
        for key, (rows, columns) in self.shapes().items():
            values, indices = tensors[f"values_{key}"], tensors[f"indices_{key}"]
            expected = own[f"values_{key}"].shape
            if values.shape != expected or indices.shape != expected:
                raise ValueError(
                    f"The adapter has {list(values.shape)} values at {list(indices.shape)} places for {key!r} of {name!r}, this layer "
                    f"keeps {list(expected)}: inject with the adapter's own r and sparsity, into its own base model."
                )
            whole = not indices.is_floating_point() and bool((indices.diff() > 0).all())
            if not whole or (
                len(indices) and not 0 <= int(indices[0]) <= int(indices[-1]) < rows * columns
            ):
                raise ValueError(
                    f"The places of {key!r} in {name!r} are not ascending whole numbers below {rows} · {columns}: the mask is damaged."
                )


@register
class SparseLoRALinear(MaskedLinear):
    """A frozen linear layer plus an update by masked factors: `y = base(x) + scaling · (M_B ∘ B) (M_A ∘ A) dropout(x)`.

    The masks are drawn at random, from torch's generator, when the layer is made; A starts Kaiming-uniform where it is not masked, B zero.
    ΔW is as good as dense, and the matrix products are those of plain LoRA: what shrinks is the number of trained
    parameters and the optimiser's state. Arguments are those of `LoRALinear`, and:

    Args:
        sparsity: share of each factor's entries that is masked, in [0, 1). At least one entry stays.

    Attributes:
        values_A, indices_A, values_B, indices_B: `[nnz]`; see `MaskedLinear`.

    Raises:
        ValueError: a sparsity outside [0, 1), and as `LoRALinear`.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        sparsity: float = 0.5,
    ) -> None:
        if not 0 <= sparsity < 1:
            raise ValueError(
                f"sparsity={sparsity!r}: the share of masked entries, in [0, 1), is expected."
            )
        super().__init__(base_layer, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
        self.sparsity = sparsity
        for name in "AB":
            matrix = getattr(self, name)
            delattr(self, name)
            count = max(1, round((1 - sparsity) * matrix.numel()))
            self.keep(name, matrix, random_places(matrix.numel(), count, matrix.device))

    def shapes(self) -> dict[str, tuple[int, int]]:
        return {"A": (self.r, self.in_features), "B": (self.out_features, self.r)}

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """`(M_A ∘ A, M_B ∘ B, scaling)`: dense factors with zeros in them."""
        return self.matrix("A"), self.matrix("B"), self.scaling

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sparsity={self.sparsity:g}"


@register
class SparseDeltaLinear(MaskedLinear):
    """A frozen linear layer of which some weights are trained: `y = base(x) + scaling · (M ∘ V) dropout(x)`.

    M has r · (in + out) ones, as PEFT's `ShiraConfig` counts: as many trained numbers as a LoRA layer of rank r. V starts at zero.
    The rank of ΔW is not limited by r; nor is it low-rank, so that it can't be exported as LoRA. Arguments are those of
    `LoRALinear`, and:

    Args:
        mask: "random", drawn from torch's generator, or "magnitude", the largest |W₀|.

    Attributes:
        values_delta: V where it exists, `[nnz]`.    indices_delta: `[nnz]`; see `MaskedLinear`.
        scaling: α/r, or α/√r. PEFT's SHiRA has 1.

    Raises:
        ValueError: more places than the weight has, an unknown mask, another initialisation than True, and as `LoRALinear`.
        TypeError: a mask by magnitude on a 4-bit base.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        mask: str = "random",
    ) -> None:
        if mask not in ("random", "magnitude"):
            raise ValueError(f"mask={mask!r}: 'random' or 'magnitude' is expected.")
        if init_lora_weights is not True:
            raise ValueError(
                f"init_lora_weights={init_lora_weights!r}: there are no factors here, and ΔW starts at zero. Leave it at True."
            )
        if mask == "magnitude" and is_4bit(base_layer):
            raise TypeError(
                "mask='magnitude' reads the weight, and a 4-bit base holds codes: use mask='random'."
            )
        super().__init__(base_layer, r, lora_alpha, lora_dropout, use_rslora)
        device, total, count = (
            self.A.device,
            self.out_features * self.in_features,
            r * (self.out_features + self.in_features),
        )
        if count > total:
            raise ValueError(
                f"r={r} asks for {count} trained weights of the {total} that there are: take r up to {total // (count // r)} here."
            )
        del self.A, self.B
        if mask == "magnitude":
            places = base_layer.weight.detach().abs().flatten().topk(count).indices.to(device)
        else:
            places = random_places(total, count, device)
        self.keep("delta", torch.zeros(1, device=device).expand(total), places)
        self._places: tuple[Tensor, int | None, Places] | None = None

    def shapes(self) -> dict[str, tuple[int, int]]:
        return {"delta": (self.out_features, self.in_features)}

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` → `[..., out]`; ΔW is not built."""
        y = self.base_layer(x)
        if self.merged or not self.enabled:
            return y
        dtype = update_dtype(y)
        values = (self.scaling * self.values_delta).to(dtype)
        return y + SparseProduct.apply(self.lora_dropout(x).to(dtype), values, self.places())

    def places(self) -> Places:
        """`indices_delta` in the order of rows and of columns; computed once for a mask."""
        indices, known = self.indices_delta, self._places
        version = (
            None if indices.is_inference() else indices._version
        )  # a mask that is loaded or moved is another one
        if known is None or known[0] is not indices or known[1] != version:
            with torch.inference_mode(False):  # what is computed in evaluation serves training too
                self._places = known = (
                    indices,
                    version,
                    Places.of(indices.long(), *self.shapes()["delta"]),
                )
        return known[2]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_places": None}

    def delta_weight(self) -> Tensor:
        """ΔW = scaling · (M ∘ V), `[out, in]`, fp32."""
        return self.scaling * self.matrix("delta").float()

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Raises NotImplementedError: ΔW is sparse and not low-rank."""
        raise NotImplementedError(
            "A mask on ΔW has no low-rank factors, so it can't be exported as LoRA or joined with LoRA states. Keep it with "
            "save_adapter, or serve it with merge(model) and unload(model)."
        )


class Places(NamedTuple):
    """Where the entries of a sparse matrix are, by rows and by columns; `starts` say where each begins. All int32."""

    columns: Tensor  # [nnz], by rows
    row_starts: Tensor  # [out]
    rows: Tensor  # [nnz], by columns
    column_starts: Tensor  # [in]
    by_column: Tensor  # [nnz]: the order of the entries, numbered by rows, that `rows` has

    @classmethod
    def of(cls, indices: Tensor, rows: int, columns: int) -> Places:
        """`indices` `[nnz]` int64, flat and ascending, of a matrix of this shape."""
        row, column = indices // columns, indices % columns
        sorted_columns, by_column = column.sort(stable=True)
        starts = (
            torch.searchsorted(line, torch.arange(count, device=line.device))
            for line, count in ((row, rows), (sorted_columns, columns))
        )
        return cls(
            *(
                found.int()
                for found in (column, next(starts), row[by_column], next(starts), by_column)
            )
        )


class SparseProduct(torch.autograd.Function):
    """`x` `[..., in]` → x Sᵀ `[..., out]` for a sparse S `[out, in]`, with a gradient for its values alone; no `[out, in]` matrix is made.

    Row i of (x Sᵀ)ᵀ is a weighted sum of rows of xᵀ: what torch calls an embedding bag. ∂L/∂x is the same with S transposed, and
    ∂L/∂v_k, for the value v_k at place (i, j), the product of row j of xᵀ with row i of (∂L/∂y)ᵀ: that bag's gradient for its weights.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, places: Places) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.places = places
        y = F.embedding_bag(
            places.columns, _transposed(x), places.row_starts, mode="sum", per_sample_weights=values
        )
        return _transposed(y).view(*x.shape[:-1], len(places.row_starts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, values = ctx.saved_tensors
        places, of_values = ctx.places, None
        dtype = torch.promote_types(
            x.dtype, torch.float32
        )  # a bag's gradient in bf16 is missing in some versions of torch on GPUs
        with torch.enable_grad():
            weights = values.detach()[places.by_column].to(dtype).requires_grad_()
            bags = F.embedding_bag(
                places.rows,
                _transposed(gradient).to(dtype),
                places.column_starts,
                mode="sum",
                per_sample_weights=weights,
            )
        if ctx.needs_input_grad[1]:
            (found,) = torch.autograd.grad(bags, weights, _transposed(x).to(dtype))
            of_values = torch.empty_like(values)
            of_values[places.by_column] = found.to(values.dtype)
        return _transposed(bags.detach()).view(x.shape).to(x.dtype), of_values, None


def _transposed(x: Tensor) -> Tensor:
    """`[..., n]` → `[n, rows]`, contiguous."""
    return x.reshape(x.numel() // x.shape[-1] if x.numel() else 0, x.shape[-1]).t().contiguous()


def scatter(values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix of `shape` with `values` `[nnz]` at the flat places `indices` `[nnz]`, zero elsewhere; differentiable in `values`."""
    return values.new_zeros(shape[0] * shape[1]).index_put((indices.long(),), values).view(shape)


def random_places(total: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """`count` different whole numbers below `total`, `[count]`, every choice as likely as any other; from torch's generator."""
    found = torch.randint(total, (count,)).unique()
    while len(found) < count:
        found = torch.cat([found, torch.randint(total, (count,))]).unique()
    return found[torch.randperm(len(found))[:count]].to(device)
