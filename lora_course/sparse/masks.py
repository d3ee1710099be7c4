"""Masks that are drawn once: on the factors of an adapter, or on ΔW itself (SHiRA, arXiv 2406.13175).

    factors    ΔW = s · (M_B ∘ B) (M_A ∘ A)
    ΔW         ΔW = s · (M ∘ V),  M ∈ {0, 1}^{out×in} with r · (in + out) ones

What is masked is not stored: a matrix M ∘ X is its `values` [nnz], which are trained, and their `indices` [nnz], a buffer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lora_course.linears import is_4bit, update_dtype
from lora_course.lora import AdapterState, LoRALinear, register
from lora_course.sparse.product import Places, SparseProduct


class MaskedLinear(LoRALinear):
    """What the two masked layers share: matrices of which only the entries at fixed places exist.

    Matrix X is kept as `values_X` `[nnz]`, trained, fp32, and `indices_X` `[nnz]`, int32, ascending: a buffer, so that it is saved,
    loaded and moved with the layer, and is no parameter.
    """

    def register_masked(self, name: str, matrix: Tensor, indices: Tensor) -> None:
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
        *,
        sparsity: float = 0.5,
        **fields: Any,
    ) -> None:
        if not 0 <= sparsity < 1:
            raise ValueError(
                f"sparsity={sparsity!r}: the share of masked entries, in [0, 1), is expected."
            )
        super().__init__(base_layer, r, lora_alpha, **fields)
        self.sparsity = sparsity
        for name in "AB":
            matrix = getattr(self, name)
            delattr(self, name)
            count = max(1, round((1 - sparsity) * matrix.numel()))
            self.register_masked(name, matrix, random_places(matrix.numel(), count, matrix.device))

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

    values_delta: nn.Parameter
    indices_delta: Tensor

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        *,
        init_lora_weights: bool | str = True,
        mask: str = "random",
        **fields: Any,
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
        if mask == "magnitude" and base_layer.weight.is_meta:
            raise TypeError(
                "mask='magnitude' reads the weight, and this base has none here (it is described or offloaded only): load it whole."
            )
        super().__init__(base_layer, r, lora_alpha, **fields)
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
        self.register_masked("delta", torch.zeros(1, device=device).expand(total), places)
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
                    Places.from_indices(indices.long(), *self.shapes()["delta"]),
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


def scatter(values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix of `shape` with `values` `[nnz]` at the flat places `indices` `[nnz]`, zero elsewhere; differentiable in `values`."""
    return values.new_zeros(shape[0] * shape[1]).index_put((indices.long(),), values).view(shape)


def random_places(total: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """`count` different whole numbers below `total`, `[count]`, every choice as likely as any other; from torch's generator."""
    found = torch.randint(total, (count,)).unique()
    while len(found) < count:
        found = torch.cat([found, torch.randint(total, (count,))]).unique()
    return found[torch.randperm(len(found))[:count]].to(device)
