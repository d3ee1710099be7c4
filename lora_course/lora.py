"""Low-rank adaptation of a frozen linear layer.

    y = W₀ x + b + s · B A x,        A ∈ R^{r×in},  B ∈ R^{out×r},  s = α/r  (or α/√r: rank-stabilised)

Sources: LoRA, arXiv 2106.09685; rank stabilisation, arXiv 2312.03732. Names are PEFT's. `injection` puts such layers
into a model, `states` takes adapters out of it, `linears` says what may lie under one.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lora_course.linears import (
    check_linear,
    check_mergeable,
    check_sum_finite,
    execution_device,
    is_4bit,
    keep_unpacked,
    shown,
    update_dtype,
    whole,
)

AdapterState = dict[str, Tensor]
"""`"<module>.A"`, `"<module>.B"`, `"<module>.scaling"` (0-dimensional) and whatever else a variant's layer keeps."""

LAYERS: dict[str, type[LoRALinear]] = {}
"""Layer classes by name: what a checkpoint may ask for."""

LARGEST_COPIED_RANK = 10
"""Up to this rank a CPU gets Bᵀ as a contiguous copy: autograd takes the order of its products from the layout of their
factors, and with thin ones the order matters. Above it there is nothing to gain (measured in chapter 4.4)."""


def register(layer: type[LoRALinear]) -> type[LoRALinear]:
    """Make a layer class known to checkpoints under its class name."""
    LAYERS[layer.__name__] = layer
    return layer


@register
class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank update: `y = base(x) + scaling · B A dropout(x)`.

    `B` starts at zero and `A` does not: the layer starts as the base layer, and the first gradient reaches `B`
    (∂L/∂B = s · ∂L/∂y (A x)ᵀ), the second one `A`. With both at zero neither would ever move.

    Args:
        base_layer: `nn.Linear` or bitsandbytes `Linear4bit`, `in → out`; its parameters are frozen here.
        r: rank, ≥ 1.
        lora_alpha: α, > 0.
        lora_dropout: probability of zeroing an element of the update's input while training.
        use_rslora: scale by α/√r instead of α/r.
        init_lora_weights: True (`A` Kaiming-uniform, as PEFT) or "gaussian" (`A` normal with deviation 1/r).

    Attributes:
        A: `[r, in]`, fp32 whatever the base's type.    B: `[out, r]`, fp32.
        scaling: s.    merged: the base weight holds the update.    folded: it holds a part (`progressive`).    enabled: the update is applied.

    Raises:
        ValueError: r < 1, α ≤ 0, dropout outside [0, 1), an unknown initialisation.
        TypeError: `base_layer` is no linear layer of these two kinds.
    """

    supported_fields = frozenset({
        "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "target_modules", "exclude_modules",
        "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
        # these describe the adapter and change nothing that the layer computes
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode",
    })  # fmt: skip
    """Fields of the configuration that this layer obeys; any other that is set is refused."""

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
    ) -> None:
        super().__init__()
        check_linear(base_layer, "base_layer")
        self._check_arguments(r, lora_alpha, lora_dropout, init_lora_weights)
        self.base_layer = base_layer.requires_grad_(False)
        if is_4bit(base_layer):
            keep_unpacked(base_layer)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        device = execution_device(base_layer)
        self.A = nn.Parameter(torch.empty(r, self.in_features, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.zeros(self.out_features, r, dtype=torch.float32, device=device))
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.merged, self.folded, self.enabled = False, False, True
        self.weight_shared_with: str | None = None  # set by `inject`

    @property
    def weight(self) -> Tensor:
        """The base's weight, to be asked for its type and shape: computing with it raises, as that would miss the update."""
        return shown(self.base_layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """As `weight`."""
        return None if self.base_layer.bias is None else shown(self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` → `[..., out]`, in the base's type; the update is computed in autocast's type, if it is on."""
        y = self.base_layer(x)
        if self.merged or not self.enabled:
            return y
        return self.add_update(y, x, *self.factors())

    def add_update(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """`y + scaling · B transform_hidden(A dropout(x))`, with `y` `[..., out]` the base's output for `x` `[..., in]`."""
        dtype = update_dtype(y)
        h = self.transform_hidden(F.linear(self.lora_dropout(x).to(dtype), A.to(dtype)))
        Bt = B.to(dtype).t()
        if B.shape[1] <= LARGEST_COPIED_RANK and B.device.type == "cpu":
            Bt = Bt.contiguous()
        if y.dtype != dtype:
            return torch.add(y, h @ Bt, alpha=scaling)
        # A product and a sum in one call: no scaled copy of the update is stored. B A is never formed.
        rows = y.numel() // self.out_features
        flat = torch.addmm(
            y.reshape(rows, self.out_features), h.reshape(rows, B.shape[1]), Bt, alpha=scaling
        )
        return flat.view(y.shape)

    def transform_hidden(self, h: Tensor) -> Tensor:
        """What happens to `h = A x` `[..., r]` on its way to `B`; nothing here."""
        return h

    @classmethod
    def initial_rank(cls, config: LoraConfig) -> int:
        """The rank that `config` gives to modules that its `rank_pattern` does not name.

        `inject` asks before it changes anything: a layer whose configuration has a field of its own for the rank, or
        must fit together in some other way, overrides this, and raises.
        """
        return config.r

    @classmethod
    def after_inject(cls, model: nn.Module, layers: dict[str, LoRALinear]) -> None:
        """Called at the end of `inject`: for what layers share, such as a router and its hooks. Nothing here."""

    @classmethod
    def before_unload(cls, model: nn.Module, layers: dict[str, LoRALinear]) -> None:
        """Called by `unload`, and where `after_inject` raised: takes back what `after_inject` put into the model."""

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """`(A, B, scaling)` of the plain LoRA layer that computes the same update; `forward` computes with them."""
        return self.A, self.B, self.scaling

    def delta_weight(self) -> Tensor:
        """ΔW = scaling · B A, `[out, in]`, fp32."""
        A, B, scaling = self.factors()
        return scaling * (B.float() @ A.float())

    @torch.no_grad()
    def merge(self) -> None:
        """Add ΔW to the base weight, in place; the layer then costs what the base costs.

        The sum is rounded once, to the base's type: about 1e-7 relative in fp32, 4e-3 in bf16.

        Raises:
            RuntimeError: already merged, or offloaded.    TypeError: not in the weight that the base computes with.
            ValueError: ΔW holds NaN or leaves the range of the weight's type. The weight is then as it was.
        """
        self.check_merge("this layer")
        self._add_to_base(self.delta_weight())
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract ΔW from the base weight again: exact to rounding, so in bf16 only nearly the weight that was."""
        if not self.merged:
            raise RuntimeError(
                "This layer is not merged: there is nothing to take back. Call merge() first."
            )
        self._add_to_base(-self.delta_weight())
        self.merged = False

    def check_merge(self, name: str) -> None:
        """Raise, with the layer's `name`, if `merge` would do something else than add ΔW once."""
        if self.merged:
            raise RuntimeError(
                f"{name!r} is merged already: a second merge would add ΔW twice. Call unmerge first."
            )
        check_mergeable(self.base_layer, name)
        if self.weight_shared_with:
            raise RuntimeError(
                f"{name!r} shares its weight with {self.weight_shared_with!r}: a merge would change both. Serve unmerged, "
                "or give one of them a weight of its own (a copy) before inject."
            )
        check_sum_finite(self.base_layer.weight, self.delta_weight(), name)

    def _add_to_base(self, delta: Tensor) -> None:
        weight = self.base_layer.weight
        weight.copy_(weight + delta if weight.dtype == torch.float64 else weight.float() + delta)

    def get_extra_state(self) -> Tensor:
        """What `state_dict` holds beside the tensors, since they say nothing without it: scaling and whether it is merged."""
        return torch.tensor([self.scaling, self.merged], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over what `get_extra_state` gave; called by `load_state_dict`."""
        self._set_scaling(float(state[0]))
        self.merged = bool(state[1])

    def _set_scaling(self, scaling: float) -> None:
        self.scaling = scaling
        self.lora_alpha = scaling * (math.sqrt(self.r) if self.use_rslora else self.r)

    def tensors(self) -> AdapterState:
        """This layer's own parameters and persistent buffers by name, with `scaling`; not the base's. No copies."""
        own = {
            name: tensor.detach()
            for name, tensor in itertools.chain(self.named_parameters(), self.named_buffers())
            if not name.startswith("base_layer.")
        }
        return own | {"scaling": torch.tensor(self.scaling, dtype=torch.float64)}

    def copy_of_tensors(self) -> AdapterState:
        """`tensors()`, copied; gathered where FSDP has sharded them (then every process has to call this)."""
        return {name: whole(tensor).clone() for name, tensor in self.tensors().items()}

    @torch.no_grad()
    def load_tensors(self, tensors: AdapterState) -> None:
        """Take over what `tensors()` of such a layer gave. Where a shape differs, the parameter is a new one."""
        for name, new in tensors.items():
            if name == "scaling":
                self.scaling = float(new)
                continue
            path, _, leaf = name.rpartition(".")
            owner = self.get_submodule(path)
            old: Tensor = getattr(owner, leaf)
            if isinstance(old, DTensor):
                new = distribute_tensor(new.to(old.device), old.device_mesh, old.placements)
            if new.shape == old.shape:
                old.copy_(new)
                continue
            fresh = new.to(old.device, old.dtype, copy=True)
            is_parameter = isinstance(old, nn.Parameter)
            setattr(owner, leaf, nn.Parameter(fresh, old.requires_grad) if is_parameter else fresh)
        self.r = self.A.shape[0]
        self._set_scaling(self.scaling)

    def check_tensors(self, name: str, tensors: AdapterState) -> None:
        """Raise ValueError unless `tensors` fit this layer, called `name`. Nothing is changed."""
        expected = set(self.tensors())
        if set(tensors) != expected:
            raise ValueError(
                f"The adapter holds {sorted(tensors)} for {name!r}, a {type(self).__name__} keeps {sorted(expected)}: "
                "it was made with another kind of layer. Inject that layer, or use factor_state() of its model."
            )
        A, B, r = tensors["A"], tensors["B"], tensors["A"].shape[:1]
        if tensors["scaling"].numel() != 1:
            raise ValueError(
                f"The adapter's scaling for {name!r} is {list(tensors['scaling'].shape)}; one number is expected."
            )
        if (A.shape, B.shape) != ((*r, self.in_features), (self.out_features, *r)):
            raise ValueError(
                f"The adapter's factors for {name!r} are A {list(A.shape)} and B {list(B.shape)}; this layer needs "
                f"A [r, {self.in_features}] and B [{self.out_features}, r]: it was made for another base model."
            )

    @classmethod
    def _check_arguments(cls, r: int, lora_alpha: float, dropout: float, init: bool | str) -> None:
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise ValueError(
                f"r={r!r}: the rank must be a whole number of 1 or more; leave a layer out with exclude_modules."
            )
        if not isinstance(lora_alpha, int | float) or not 0 < lora_alpha < math.inf:
            raise ValueError(
                f"lora_alpha={lora_alpha!r}: a positive, finite scale is expected; lora_alpha = r gives scaling 1."
            )
        if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"lora_dropout={dropout!r}: a probability in [0, 1) is expected.")
        if init is not True and init != "gaussian":
            raise ValueError(
                f"init_lora_weights={init!r} is not supported by {cls.__name__}: "
                "use True (A Kaiming-uniform, B zero) or 'gaussian' (A normal, B zero)."
            )

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, merged={self.merged}"
