"""Adapters as states: taken out of a model, put in, added, cut, compared.

state = adapter_state(model)          everything the layers keep
state = factor_state(model)           plain A, B and scaling, whatever the layer: what can be computed with
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_course.injection import adapter_layers
from lora_course.linears import whole
from lora_course.lora import AdapterState


def adapter_state(model: nn.Module) -> AdapterState:
    """A copy of everything the adapter holds; the base is not in it."""
    return {
        f"{name}.{key}": tensor
        for name, layer in adapter_layers(model).items()
        for key, tensor in layer.copy_of_tensors().items()
    }


def factor_state(model: nn.Module) -> AdapterState:
    """A copy of the adapter as plain LoRA factors, whatever its layer: what can be concatenated, cut and exported."""
    state: AdapterState = {}
    for name, layer in adapter_layers(model).items():
        A, B, scaling = layer.factors()
        state |= {
            f"{name}.A": whole(A).clone(),
            f"{name}.B": whole(B).clone(),
            f"{name}.scaling": torch.tensor(scaling, dtype=torch.float64),
        }
    return state


def split_state(state: AdapterState) -> dict[str, AdapterState]:
    """`{"<module>.A": …}` → `{"<module>": {"A": …}}`."""
    if not isinstance(state, Mapping):
        raise TypeError(
            f"An adapter's state is a dictionary of tensors by name, not a {type(state).__name__}: take it with "
            "adapter_state(model) or factor_state(model)."
        )
    modules: dict[str, AdapterState] = {}
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise TypeError(
                f"An adapter's state holds {key!r}: a {type(tensor).__name__}; names with tensors are expected."
            )
        module, _, name = key.rpartition(".")
        modules.setdefault(module, {})[name] = tensor
    return modules


def use_adapter(model: nn.Module, state: AdapterState) -> nn.Module:
    """Put `state` into the injected `model`: all of it, or, where something does not fit, nothing.

    Raises:
        ValueError: other modules or shapes than the model's; NaN or infinite numbers.
        RuntimeError: the model is merged.
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
    check_finite(state)
    before = {name: layer.copy_of_tensors() for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.load_tensors(modules[name])
    except Exception:
        for name, layer in layers.items():
            layer.load_tensors(before[name])
        raise
    return model


def check_finite(state: AdapterState) -> None:
    """Raise ValueError, naming the tensor, where an adapter holds NaN or infinite numbers."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{name!r} holds numbers that are NaN or infinite: its training diverged. Take an earlier state or checkpoint."
            )


def concatenate(
    states: Sequence[AdapterState], weights: Sequence[float] | None = None
) -> AdapterState:
    """The adapter whose update is Σ wₖ ΔWₖ, exactly: rank Σ rₖ, scaling 1 (wₖ sₖ goes into Bₖ).

    Averaging the `A`s and the `B`s apart is something else: it mixes Bᵢ Aⱼ of different adapters.
    A module that some states lack gets nothing from them.
    """
    weights = check_weights(states, weights)
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
    check_rank(r)
    cut = {}
    for module, tensors in split_state(state).items():
        A, B, scaling = _plain(module, tensors)
        left, core, right = core_of(A, B, scaling)
        U, S, Vh = torch.linalg.svd(core, full_matrices=False)
        root = S[:r].sqrt()
        cut[module] = (
            (root[:, None] * Vh[:r] @ right.t()).to(A.dtype),
            (left @ U[:, :r] * root).to(B.dtype),
        )
    return _state(cut)


def relative_error(state: AdapterState, reference: AdapterState) -> float:
    """‖ΔW − ΔW_ref‖ / ‖ΔW_ref‖, Frobenius over all modules. In float64 from the factors: no `[out, in]` matrix is formed."""
    difference, size = (
        _norm(concatenate([state, reference], [1.0, -1.0])),
        _norm(concatenate([reference])),
    )
    return difference / size if size else math.inf if difference else 0.0


def core_of(A: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """`(Q_B, core, Q_A)` with s B A = Q_B core Q_Aᵀ: orthonormal `[out, r]` and `[in, r]` around a small `[r, r]`.

    The core has ΔW's singular values and its norm, so that neither needs an `[out, in]` matrix. In float64.
    """
    Q_B, R_B = torch.linalg.qr(scaling * B.double())
    Q_A, R_A = torch.linalg.qr(A.double().t())
    return Q_B, R_B @ R_A.t(), Q_A


def check_weights(
    states: Sequence[AdapterState], weights: Sequence[float] | None, default: float = 1.0
) -> list[float]:
    """`weights` as a list, all `default` where there are none. Raises ValueError unless there is a finite number for each state."""
    found = [default] * len(states) if weights is None else list(weights)
    if not states or len(states) != len(found):
        raise ValueError(
            f"{len(states)} states and {len(found)} weights: give one or more states and a weight for each."
        )
    for weight in found:
        if not isinstance(weight, numbers.Real | Tensor) or not math.isfinite(weight):
            raise ValueError(f"weights={found}: finite numbers are expected, one for each state.")
    return found


def check_rank(r: int) -> None:
    """Raise ValueError unless `r` is a whole number of 1 or more."""
    if not isinstance(r, numbers.Integral) or isinstance(r, bool) or r < 1:
        raise ValueError(f"r={r!r}: the rank must be a whole number of 1 or more.")


def _norm(state: AdapterState) -> float:
    squares = 0.0
    for module, tensors in split_state(state).items():
        squares += core_of(*_plain(module, tensors))[1].square().sum().item()
    return math.sqrt(squares)


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
    A, B, scaling = tensors["A"], tensors["B"], tensors["scaling"]
    fit = A.ndim == B.ndim == 2 and A.shape[:1] == B.shape[1:] and scaling.numel() == 1
    if not fit or not (A.is_floating_point() and B.is_floating_point()):
        raise ValueError(
            f"{module!r} holds A {list(A.shape)} of {A.dtype}, B {list(B.shape)} of {B.dtype} and scaling {list(scaling.shape)}: "
            "A [r, in], B [out, r] and one number are expected."
        )
    check_finite({f"{module}.{name}": tensor for name, tensor in tensors.items()})
    return widened(A), widened(B), float(scaling)


def widened(factor: Tensor) -> Tensor:
    """In fp32 at least: in half precision a product with a weight or scale would be rounded, and torch has no SVD."""
    return factor.float() if factor.dtype in (torch.bfloat16, torch.float16) else factor
