"""Low-rank adaptation of frozen linear layers: the layer, and what one does with a model full of them.

    y = W₀ x + b + s · B A x,        A ∈ R^{r×in},  B ∈ R^{out×r},  s = α/r  (or α/√r: rank-stabilised)

Sources: LoRA, arXiv 2106.09685; rank stabilisation, arXiv 2312.03732. Names and configuration are PEFT's.

One base carries one adapter at a time. A second adapter is a second *state*: `adapter_state` takes one out of the
model, `use_adapter` puts one in, `concatenate` and `truncate` compute with them.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

AdapterState = dict[str, Tensor]
"""`"<module>.A"`, `"<module>.B"`, `"<module>.scaling"` (0-dimensional) and whatever else a variant's layer keeps."""

LAYERS: dict[str, type[LoRALinear]] = {}
"""Layer classes by name: what a checkpoint may ask for."""


THIN = 10
"""Up to this rank a CPU gets Bᵀ as a contiguous matrix: autograd takes the order of its products from the layout of their
factors, and with thin ones the order matters. Above it there is nothing to gain (measured in chapter 4.4)."""


def register(layer: type[LoRALinear]) -> type[LoRALinear]:
    """Make a layer class known to checkpoints under its class name."""
    LAYERS[layer.__name__] = layer
    return layer


def is_4bit(linear: nn.Module) -> bool:
    """Whether `linear` is a bitsandbytes `Linear4bit` (its weight is packed, two codes a byte)."""
    return type(linear).__name__ in {"Linear4bit", "LinearNF4", "LinearFP4"}


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
        scaling: s.    merged: the base weight holds the update.    enabled: the update is applied.

    Raises:
        ValueError: r < 1, α ≤ 0, dropout outside [0, 1), an unknown initialisation.
        TypeError: `base_layer` is no linear layer of these two kinds.
    """

    honoured = frozenset({
        "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "target_modules", "exclude_modules",
        "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
        # these describe the adapter and change nothing that the layer computes
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode",
    })  # fmt: skip
    """Fields of the configuration that this layer obeys; any other that is set is refused."""

    @classmethod
    def initial_rank(cls, config: LoraConfig) -> int:
        """The rank that `config` gives to modules that its `rank_pattern` does not name.

        `inject` asks before it changes anything: a layer whose configuration has a field of its own for the rank, or
        must fit together in some other way, overrides this, and raises.
        """
        return config.r

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
        _check_linear(base_layer, "base_layer")
        if not isinstance(r, int) or r < 1:
            raise ValueError(
                f"r={r!r}: the rank must be a whole number of 1 or more; leave a layer out with exclude_modules."
            )
        if not lora_alpha > 0:
            raise ValueError(
                f"lora_alpha={lora_alpha!r}: the scale must be positive; lora_alpha = r gives scaling 1."
            )
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout={lora_dropout!r}: a probability in [0, 1) is expected.")
        if init_lora_weights is not True and init_lora_weights != "gaussian":
            raise ValueError(
                f"init_lora_weights={init_lora_weights!r} is not supported by {type(self).__name__}: "
                "use True (A Kaiming-uniform, B zero) or 'gaussian' (A normal, B zero)."
            )
        self.base_layer = base_layer.requires_grad_(False)
        if is_4bit(base_layer):
            _protect(base_layer)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_dropout = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        device = _execution_device(base_layer)
        self.A = nn.Parameter(torch.empty(r, self.in_features, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.zeros(self.out_features, r, dtype=torch.float32, device=device))
        if init_lora_weights == "gaussian":
            nn.init.normal_(self.A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.merged = False
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` → `[..., out]`, in the base's type; the update is computed in autocast's type, if it is on."""
        y = self.base_layer(x)
        if self.merged or not self.enabled:
            return y
        return self.add_update(y, x, *self.factors())

    def add_update(self, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """`y + scaling · B between(A dropout(x))`, with `y` `[..., out]` the base's output for `x` `[..., in]`."""
        dtype = update_dtype(y)
        h = self.between(F.linear(self.lora_dropout(x).to(dtype), A.to(dtype)))
        Bt = B.to(dtype).t()
        if B.shape[1] <= THIN and B.device.type == "cpu":
            Bt = Bt.contiguous()
        if y.dtype != dtype:
            return torch.add(y, h @ Bt, alpha=scaling)
        # A product and a sum in one call: no scaled copy of the update is stored. B A is never formed.
        rows = y.numel() // self.out_features
        flat = torch.addmm(
            y.reshape(rows, self.out_features), h.reshape(rows, B.shape[1]), Bt, alpha=scaling
        )
        return flat.view(y.shape)

    def between(self, h: Tensor) -> Tensor:
        """What happens to `h = A x` `[..., r]` on its way to `B`; nothing here."""
        return h

    @classmethod
    def connect(cls, model: nn.Module, layers: dict[str, LoRALinear]) -> None:
        """Called at the end of `inject`: for what layers share, such as a router and its hooks. Nothing here."""

    @classmethod
    def disconnect(cls, model: nn.Module, layers: dict[str, LoRALinear]) -> None:
        """Called by `unload`, and where `connect` raised: takes back what `connect` put into the model."""

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
            RuntimeError: already merged, or the weight is offloaded.    TypeError: the base is 4-bit.
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
        if is_4bit(self.base_layer):
            raise TypeError(
                f"The base of {name!r} is 4-bit: adding ΔW would round the sum to 16 values a block. Call "
                "lora_course.qlora.dequantize_model(model) and merge then, or merge_requantized(model) to accept the loss."
            )
        if self.base_layer.weight.is_meta:
            raise RuntimeError(
                f"The weight of {name!r} is offloaded to disk: load the base without offloading to merge."
            )

    def _add_to_base(self, delta: Tensor) -> None:
        weight = self.base_layer.weight
        weight.copy_(weight + delta if weight.dtype == torch.float64 else weight.float() + delta)

    def tensors(self) -> AdapterState:
        """This layer's own parameters and persistent buffers by name, with `scaling`; not the base's. No copies."""
        own = {
            name: tensor.detach()
            for name, tensor in itertools.chain(self.named_parameters(), self.named_buffers())
            if not name.startswith("base_layer.")
        }
        return own | {"scaling": torch.tensor(self.scaling, dtype=torch.float64)}

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
            if new.shape == old.shape:
                old.copy_(new)
                continue
            fresh = new.to(old.device, old.dtype, copy=True)
            is_parameter = isinstance(old, nn.Parameter)
            setattr(owner, leaf, nn.Parameter(fresh, old.requires_grad) if is_parameter else fresh)
        self.r = self.A.shape[0]
        self.lora_alpha = self.scaling * (math.sqrt(self.r) if self.use_rslora else self.r)

    def check_tensors(self, name: str, tensors: AdapterState) -> None:
        """Raise ValueError unless `tensors` fit this layer, called `name`. Nothing is changed."""
        expected = set(self.tensors())
        if set(tensors) != expected:
            raise ValueError(
                f"The adapter holds {sorted(tensors)} for {name!r}, a {type(self).__name__} keeps {sorted(expected)}: "
                "it was made with another kind of layer. Inject that layer, or use factor_state() of its model."
            )
        A, B = tensors["A"], tensors["B"]
        if (
            A.shape[1:] != (self.in_features,)
            or B.shape[:1] != (self.out_features,)
            or B.shape[1:] != A.shape[:1]
        ):
            raise ValueError(
                f"The adapter's factors for {name!r} are A {list(A.shape)} and B {list(B.shape)}; this layer needs "
                f"A [r, {self.in_features}] and B [{self.out_features}, r]: it was made for another base model."
            )

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, merged={self.merged}"


@dataclasses.dataclass
class Injection:
    """What `inject` did to a model; `model.lora_course` holds it, and checkpoints store it."""

    config: LoraConfig
    layer: type[LoRALinear]
    arguments: dict[str, object]
    trainable: list[str]
    """Names of the base's parameters that were trainable before; `unload` gives them back."""


def inject(
    model: nn.Module, config: LoraConfig, layer: type[LoRALinear] = LoRALinear, **arguments: object
) -> nn.Module:
    """Freeze `model` and wrap each linear layer that `config` targets in `layer`, in place.

    Args:
        model: any module; a Hugging Face causal LM if `target_modules="all-linear"` is to leave its head out.
        config: PEFT's `LoraConfig`. `target_modules` is "all-linear", a list of name endings, or a regular expression;
            `rank_pattern`, `alpha_pattern`, `exclude_modules`, `layers_to_transform` work as in PEFT.
        layer: the class to wrap with.
        arguments: passed on to every layer, for what a variant has beyond `LoraConfig`.

    Returns:
        `model` itself; only the adapter's parameters require gradients.

    Raises:
        ValueError: a target or pattern that matches nothing, a field that `layer` does not obey, a second injection.
        TypeError: a target that is no linear layer. Nothing has been changed then.
    """
    if isinstance(getattr(model, "lora_course", None), Injection):
        raise ValueError(
            "This model carries an adapter already. Take it out with adapter_state(model) if you need it, then call unload(model)."
        )
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise ValueError(
            "This model carries a PEFT adapter already. Merge or unload it there first: model = model.unload()."
        )
    _check_fields(config, layer)
    r = layer.initial_rank(config)
    config = copy.deepcopy(config)
    targets = _find_targets(model, config)
    patterns = {}
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, field) or {}
        patterns[field] = {
            name: pattern[key]
            for name in targets
            if (key := get_pattern_key(pattern, name)) in pattern
        }
        if unused := set(pattern) - {get_pattern_key(pattern, name) for name in targets}:
            raise ValueError(
                f"{field}: {sorted(unused)} matches none of the targets {_endings(targets)}."
            )
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    try:
        wrapped = {
            name: layer(
                linear,
                r=patterns["rank_pattern"].get(name, r),
                lora_alpha=patterns["alpha_pattern"].get(name, config.lora_alpha),
                lora_dropout=config.lora_dropout,
                use_rslora=config.use_rslora,
                init_lora_weights=config.init_lora_weights,
                **arguments,
            ).train(linear.training)
            for name, linear in targets.items()
        }
    except Exception:
        _make_trainable(model, trainable)
        raise
    model.requires_grad_(False)
    for name, module in wrapped.items():
        model.set_submodule(name, module)
        for parameter in (
            p for n, p in module.named_parameters() if not n.startswith("base_layer.")
        ):
            parameter.requires_grad_(not config.inference_mode)
    model.lora_course = Injection(config, layer, arguments, trainable)
    try:
        layer.connect(model, wrapped)
    except Exception:
        unload(model)
        raise
    return model


def injection(model: nn.Module) -> Injection:
    """What `inject` did to `model`. Raises ValueError if it carries no adapter."""
    found = getattr(model, "lora_course", None)
    if not isinstance(found, Injection):
        raise ValueError("This model carries no adapter: call inject(model, config) first.")
    return found


def adapter_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapter's layers by module name, in the model's order."""
    injection(model)
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)
    }


def trainable_parameters(model: nn.Module) -> int:
    """How many numbers training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapter_state(model: nn.Module) -> AdapterState:
    """A copy of everything the adapter holds; the base is not in it."""
    return {
        f"{name}.{key}": tensor.clone()
        for name, layer in adapter_layers(model).items()
        for key, tensor in layer.tensors().items()
    }


def factor_state(model: nn.Module) -> AdapterState:
    """A copy of the adapter as plain LoRA factors, whatever its layer: what can be concatenated, cut and exported."""
    state: AdapterState = {}
    for name, layer in adapter_layers(model).items():
        A, B, scaling = layer.factors()
        state |= {
            f"{name}.A": A.detach().clone(),
            f"{name}.B": B.detach().clone(),
            f"{name}.scaling": torch.tensor(scaling, dtype=torch.float64),
        }
    return state


def split_state(state: AdapterState) -> dict[str, AdapterState]:
    """`{"<module>.A": …}` → `{"<module>": {"A": …}}`."""
    modules: dict[str, AdapterState] = {}
    for key, tensor in state.items():
        module, _, name = key.rpartition(".")
        modules.setdefault(module, {})[name] = tensor
    return modules


def use_adapter(model: nn.Module, state: AdapterState) -> nn.Module:
    """Put `state` into the injected `model`; checked as a whole before anything changes.

    Raises:
        ValueError: other modules or shapes than the model's.    RuntimeError: the model is merged.
    """
    layers, modules = adapter_layers(model), split_state(state)
    if layers.keys() != modules.keys():
        missing, unknown = (
            sorted(layers.keys() - modules.keys()),
            sorted(modules.keys() - layers.keys()),
        )
        raise ValueError(
            f"The adapter and the model do not have the same layers: the adapter lacks {missing[:3]} ({len(missing)} in all), "
            f"the model lacks {unknown[:3]} ({len(unknown)} in all). Inject with the adapter's own target_modules."
        )
    for name, layer in layers.items():
        if layer.merged:
            raise RuntimeError(
                f"{name!r} is merged: its ΔW would stay in the base. Call unmerge(model) first."
            )
        layer.check_tensors(name, modules[name])
    for name, layer in layers.items():
        layer.load_tensors(modules[name])
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is its base. Raises RuntimeError if it is merged."""
    layers = adapter_layers(model)
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise RuntimeError(
            f"{merged[0]!r} is merged: switching the adapter off would not remove it. Call unmerge(model) first."
        )
    before = {name: layer.enabled for name, layer in layers.items()}
    for layer in layers.values():
        layer.enabled = False
    try:
        yield model
    finally:
        for name, layer in layers.items():
            layer.enabled = before[name]


def merge(model: nn.Module) -> nn.Module:
    """`merge()` on every layer, all or none. Raises as the layer does, before any weight has changed."""
    layers = adapter_layers(model)
    for name, layer in layers.items():
        layer.check_merge(name)
    for layer in layers.values():
        layer.merge()
    return model


def unmerge(model: nn.Module) -> nn.Module:
    """`unmerge()` on every layer that is merged. Raises RuntimeError if none is."""
    merged = [layer for layer in adapter_layers(model).values() if layer.merged]
    if not merged:
        raise RuntimeError("No layer of this model is merged: there is nothing to take back.")
    for layer in merged:
        layer.unmerge()
    return model


def unload(model: nn.Module) -> nn.Module:
    """Give the plain model back: the base as it was, or with the update inside if it is merged.

    `merge` and `unload` is the way to serve. What was trainable before `inject` is trainable again.
    """
    info, layers = injection(model), adapter_layers(model)
    info.layer.disconnect(model, layers)
    for name, layer in layers.items():
        model.set_submodule(name, layer.base_layer)
    _make_trainable(model, info.trainable)
    del model.lora_course
    return model


def concatenate(
    states: Sequence[AdapterState], weights: Sequence[float] | None = None
) -> AdapterState:
    """The adapter whose update is Σ wₖ ΔWₖ, exactly: rank Σ rₖ, scaling 1 (wₖ sₖ goes into Bₖ).

    Averaging the `A`s and the `B`s apart is something else: it mixes Bᵢ Aⱼ of different adapters.
    A module that some states lack gets nothing from them.
    """
    weights = [1.0] * len(states) if weights is None else list(weights)
    if not states or len(states) != len(weights):
        raise ValueError(
            f"{len(states)} states and {len(weights)} weights: give one or more states and a weight for each."
        )
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for state, weight in zip(states, weights, strict=True):
        for module, tensors in split_state(state).items():
            A, B, scaling = _plain(module, tensors)
            parts.setdefault(module, []).append((A, weight * scaling * B))
    for module, pairs in parts.items():
        shapes = {(A.shape[1], B.shape[0]) for A, B in pairs}
        if len(shapes) > 1:
            raise ValueError(
                f"{module!r} is {sorted(shapes)} (in, out) in different states: they are for different base models."
            )
    return _state(
        {
            module: (torch.cat([A for A, _ in p]), torch.cat([B for _, B in p], 1))
            for module, p in parts.items()
        }
    )


def truncate(state: AdapterState, r: int) -> AdapterState:
    """The best adapter of rank ≤ r: ΔW's r largest singular triplets (Eckart–Young), scaling 1.

    Computed from the factors in float64 (QR of both, SVD of the small core): no `[out, in]` matrix is formed.
    A module whose rank is no more than r keeps its rank, and its ΔW.
    """
    if r < 1:
        raise ValueError(f"r={r}: the rank must be 1 or more.")
    cut = {}
    for module, tensors in split_state(state).items():
        A, B, scaling = _plain(module, tensors)
        left, core_left = torch.linalg.qr(scaling * B.double())
        right, core_right = torch.linalg.qr(A.double().t())
        U, S, Vh = torch.linalg.svd(core_left @ core_right.t(), full_matrices=False)
        root = S[:r].sqrt()
        cut[module] = (
            (root[:, None] * Vh[:r] @ right.t()).to(A.dtype),
            (left @ U[:, :r] * root).to(B.dtype),
        )
    return _state(cut)


def _make_trainable(model: nn.Module, names: Sequence[str]) -> None:
    for name in names:
        model.get_parameter(name).requires_grad_(True)


def _state(factors: dict[str, tuple[Tensor, Tensor]]) -> AdapterState:
    one = torch.ones((), dtype=torch.float64)
    return {
        f"{m}.{key}": t
        for m, (A, B) in factors.items()
        for key, t in (("A", A), ("B", B), ("scaling", one.clone()))
    }


def _plain(module: str, tensors: AdapterState) -> tuple[Tensor, Tensor, float]:
    if set(tensors) != {"A", "B", "scaling"}:
        raise ValueError(
            f"{module!r} holds {sorted(tensors)}, plain LoRA holds A, B and scaling: take the state with factor_state(model)."
        )
    return tensors["A"], tensors["B"], float(tensors["scaling"])


def _check_linear(module: nn.Module, name: str) -> None:
    quantised_otherwise = (
        isinstance(module, nn.Linear)
        and not is_4bit(module)
        and not module.weight.is_floating_point()
    )
    inside_attention = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if (
        not (isinstance(module, nn.Linear) or is_4bit(module))
        or quantised_otherwise
        or inside_attention
    ):
        hint = {
            "Conv1D": "GPT-2's Conv1D stores its weight transposed: replace it by an nn.Linear of weight.T",
            "NonDynamicallyQuantizableLinear": "nn.MultiheadAttention reads its weight and never calls it",
        }.get(
            type(module).__name__,
            "leave it out of target_modules, or name the linear layers inside it",
        )
        raise TypeError(
            f"{name!r} is a {type(module).__name__}; nn.Linear or bitsandbytes' Linear4bit is expected: {hint}."
        )


def _check_fields(config: LoraConfig, layer: type[LoRALinear]) -> None:
    if not isinstance(config, LoraConfig):
        raise TypeError(
            f"config is a {type(config).__name__}; peft.LoraConfig(r=…, lora_alpha=…, target_modules=…) is expected."
        )
    ignored = []
    for field in dataclasses.fields(config):
        default = (
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
        )
        if field.name not in layer.honoured and getattr(config, field.name) != default:
            ignored.append(f"{field.name}={getattr(config, field.name)!r}")
    if ignored:
        raise ValueError(
            f"{layer.__name__} does not support {', '.join(ignored)}: leave it at its default, or use PEFT itself."
        )


def _find_targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Linear]:
    """Target layers by name; resolves "all-linear" in `config`, as PEFT does."""
    modules = {name: module for name, module in model.named_modules() if name}
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if config.target_modules is None:
        raise ValueError(
            f"target_modules is not set: give 'all-linear' or some of {_endings(linears)}."
        )
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        _refuse_fused_experts(model)
        # Conv1D is a target of PEFT's "all-linear": here it is refused by name below, not passed over.
        conv1d = {name for name, module in modules.items() if type(module).__name__ == "Conv1D"}
        config.target_modules = conv1d | {
            name for name, module in linears.items() if module is not head
        }
    targets = {
        name: module for name, module in modules.items() if check_target_module_exists(config, name)
    }
    listed = [] if isinstance(config.target_modules, str) else config.target_modules
    unknown = _unmatched(listed, modules)
    if unknown or not targets:
        given = unknown or (
            config.target_modules if isinstance(config.target_modules, str) else sorted(listed)
        )
        raise ValueError(
            f"target_modules={given!r} matches no linear layer; this model has {_endings(linears)}.{_fused(model, unknown)}"
        )
    excluded = [] if isinstance(config.exclude_modules, str) else config.exclude_modules or []
    if unknown := _unmatched(excluded, modules):
        raise ValueError(
            f"exclude_modules={unknown!r} matches no module; the linear layers are {_endings(linears)}."
        )
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    for name, module in targets.items():
        _check_linear(module, name)
        if embedding is not None and module.weight is getattr(embedding, "weight", None):
            raise TypeError(
                f"{name!r} shares its weight with the input embedding: a merged update would change both. Leave it out of target_modules."
            )
    return targets


def _unmatched(keys: Iterable[str], names: Iterable[str]) -> list[str]:
    return sorted(
        key for key in keys if not any(name == key or name.endswith(f".{key}") for name in names)
    )


def _refuse_fused_experts(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.ndim == 3 and not isinstance(owner, nn.modules.conv._ConvNd):
            raise TypeError(
                f"{name!r} {list(parameter.shape)} is a fused weight of several experts, not a linear layer, and 'all-linear' "
                "would pass over it without a word: list the linear layers to adapt in target_modules."
            )


def _fused(model: nn.Module, unknown: Sequence[str]) -> str:
    found = [
        n for n, p in model.named_parameters() if p.ndim == 3 and n.rpartition(".")[2] in unknown
    ]
    return (
        f" {found[0]!r} is a fused weight of several experts, which is not supported."
        if found
        else ""
    )


def _endings(names: Iterable[str]) -> str:
    return (
        ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "no linear layer at all"
    )


def update_dtype(y: Tensor) -> torch.dtype:
    """The type in which the update of the base's output `y` is computed: autocast's where it is on, else y's."""
    kind = y.device.type
    return (
        torch.get_autocast_dtype(kind)
        if torch.is_autocast_enabled(kind) and y.dtype != torch.float64
        else y.dtype
    )


def _execution_device(linear: nn.Module) -> torch.device | str | int:
    # A layer that accelerate keeps on the CPU or on disk runs on the device its hook names.
    hook = getattr(linear, "_hf_hook", None)
    return getattr(hook, "execution_device", None) or linear.weight.device


def _protect(linear: nn.Module) -> None:
    """Keep bitsandbytes from repacking a 4-bit weight in an eval-mode forward on a CPU with AVX512-BF16.

    After the repacking, dequantising the weight, and so merging and the gradient below it, give garbage.
    """
    linear.support_avx512bf16_for_cpu = False
    if getattr(getattr(linear.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise RuntimeError(
            "A 4-bit layer was run in eval mode before the adapter was injected, and this CPU's kernel has repacked its "
            "weight: gradients and merges would be wrong. Load the base again and inject, or call qlora.protect(model), "
            "before its first forward."
        )
