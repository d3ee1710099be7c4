"""Quantised LoRA: factors that are stored as small integers, trained so that they bear it.

    y = W₀ x + b + s · Q(B) Q(A) x,     Q(w) = Δ · clamp(round(w / Δ), −q, q),     q = 2^(bits−1) − 1,   Δ = clip · max|w| / q

Δ is the scale (the step of the grid), one for the whole factor, for each of its components, or for each group of numbers in
a component; a component is a row of A and the column of B that belongs to it. The range is symmetric: zero stays zero.
`round` has no useful gradient, so the backward pass takes Q for the identity inside the range (the straight-through
estimator, arXiv 1308.3432): ∂L/∂w := ∂L/∂Q(w), LoRA's own gradient at the quantised factors.

    inject(model, config, layer=QuantizedLoRALinear, bits=4)        # trained quantised: train as ever
    quantize_after_training(model, bits=4)                           # or a plain adapter, quantised when it is done
    save_quantized(model, "adapter"); load_quantized(base, "adapter")   # packed integers and scales on disk

A stored number costs `bits` + 32 / (numbers that share a scale) bits: 4.5 at 4 bits in groups of 64; scales are fp32.
Only files are small: what is loaded computes in fp32, as LoRA does. Related, and not what is done here: QA-LoRA (2309.14717)
and L4Q (2402.04902) quantise the base; LoRAQuant (2510.26690) gives a trained adapter's components different bits.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lora_course.checkpoint import base_fingerprint
from lora_course.files import make_folder, replace_file
from lora_course.injection import adapter_layers, inject, injection_of, unload
from lora_course.lora import AdapterState, LoRALinear, register
from lora_course.states import factor_state, use_adapter

FORMAT_VERSION = 1
GRANULARITIES = ("tensor", "channel", "group")
FILE = "quantized.safetensors"
LAYER_FIELDS = ("out_features", "in_features", "r", "lora_alpha", "scaling")


def quantize(
    x: Tensor, bits: int, granularity: str = "group", group_size: int = 64, clip: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The integers and scales of Q(x): |x − codes · scale| ≤ scale / 2 for every number, if `clip` is 1.

    Args:
        x: `[rows, length]`, finite.
        bits: 2 to 16. At 2 bits the codes are −1, 0 and 1.
        granularity: "tensor": one scale. "channel": one a row. "group": one for each `group_size` numbers of a row, in
            order; the last group of a row may be shorter.
        group_size: at least 1; not read otherwise.
        clip: in (0, 1]. Below 1 the grid ends at clip · max|x|: the largest numbers are cut, the others get a finer step.

    Returns:
        `codes`, int16, of x's shape, −q … q; `scale`, fp32, `[scales]`, > 0 even where all of x is zero. It has 16
        significant bits, so that up to 8 bits codes · scale is exact in fp32, and quantising that gives the same again.

    Raises:
        ValueError: an argument outside its range.
    """
    check_grid(bits, granularity, group_size, clip)
    codes, scale = _round(x, bits, granularity, group_size, clip)
    return _ungroup(codes.clamp(-_top(bits), _top(bits)), x.shape).to(torch.int16), scale.flatten()


def dequantize(
    codes: Tensor, scale: Tensor, granularity: str = "group", group_size: int = 64
) -> Tensor:
    """codes · scale, fp32, of the codes' shape: the values that `fake_quantize` gives with the same arguments."""
    return _ungroup(_group(codes.float(), granularity, group_size) * scale[:, None], codes.shape)


def fake_quantize(
    x: Tensor, bits: int, granularity: str = "group", group_size: int = 64, clip: float = 1.0
) -> Tensor:
    """Q(x), `[rows, length]`, in x's type, with a straight-through gradient: 1 inside the range, 0 for what was cut.

    Arguments and errors are those of `quantize`; 32 bits give back x itself. With `clip` 1 nothing is cut. The scale counts
    as a constant in the backward pass. Q(Q(x)) = Q(x), bit for bit, with `clip` 1 and up to 8 bits.
    """
    check_grid(bits, granularity, group_size, clip)
    return x if bits == 32 else _FakeQuantize.apply(x, bits, granularity, group_size, clip)


class _FakeQuantize(torch.autograd.Function):
    """One function, not x + (Q(x) − x).detach(): the gradient of that sum is 1 for what was cut, too."""

    @staticmethod
    def forward(
        ctx, x: Tensor, bits: int, granularity: str, group_size: int, clip: float
    ) -> Tensor:
        codes, scale = _round(x, bits, granularity, group_size, clip)
        if clip < 1:
            ctx.save_for_backward(_ungroup(codes.abs() <= _top(bits), x.shape))
            codes.clamp_(-_top(bits), _top(bits))
        return _ungroup(codes.mul_(scale), x.shape).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (
            gradient * ctx.saved_tensors[0] if ctx.saved_tensors else gradient,
            None,
            None,
            None,
            None,
        )


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers of −q … q as one stream of `bits` bits each, lowest bit first: uint8, ⌈numbers · bits / 8⌉ bytes."""
    unsigned = codes.flatten().int() + _top(bits)
    stream = (unsigned[:, None] >> torch.arange(bits, device=codes.device)) & 1
    stream = F.pad(stream.flatten(), (0, -stream.numel() % 8)).reshape(-1, 8)
    return (stream << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """The integers that `pack` was given, int16, in `shape`. Raises ValueError if there are too few or too many bytes."""
    numbers = torch.Size(shape).numel()
    if packed.numel() != -(-numbers * bits // 8):
        raise ValueError(
            f"{packed.numel()} bytes are no {numbers} numbers of {bits} bits: {-(-numbers * bits // 8)} are expected."
        )
    stream = (packed[:, None].int() >> torch.arange(8, device=packed.device)) & 1
    unsigned = (
        stream.flatten()[: numbers * bits].reshape(numbers, bits)
        << torch.arange(bits, device=packed.device)
    ).sum(1)
    return (unsigned - _top(bits)).to(torch.int16).reshape(shape)


@register
class QuantizedLoRALinear(LoRALinear):
    """A frozen linear layer plus a low-rank update with quantised factors: `y = base(x) + scaling · Q(B) Q(A) dropout(x)`.

    The parameters `A` and `B` stay fp32: they collect the optimiser's small steps, and the forward pass rounds them anew.
    `factors()` are the rounded ones, so that merging, ΔW and `export_peft` give what the forward pass computes. A state of
    a plain `LoRALinear` fits, which quantises it; with 32 bits this is `LoRALinear`. Arguments are those of `LoRALinear`, and:

    Args:
        bits: of both factors, 2 to 16, or 32 for none.    bits_A, bits_B: of one factor, instead.
        granularity, group_size, clip: as in `quantize`; rows are A's rows and B's columns, so a scale never spans components
            unless granularity is "tensor".

    Raises:
        ValueError: one of these outside its range, and as `LoRALinear`.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        bits: int = 4,
        bits_A: int | None = None,
        bits_B: int | None = None,
        granularity: str = "group",
        group_size: int = 64,
        clip: float = 1.0,
    ) -> None:
        bits_A, bits_B = (bits if own is None else own for own in (bits_A, bits_B))
        for own in (bits_A, bits_B):
            check_grid(own, granularity, group_size, clip)
        super().__init__(base_layer, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
        self.bits_A, self.bits_B = bits_A, bits_B
        self.granularity, self.group_size, self.clip = granularity, group_size, clip

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """`(Q(A), Q(B), scaling)`: the plain LoRA layer that computes the same update."""
        grid = (self.granularity, self.group_size, self.clip)
        return (
            fake_quantize(self.A, self.bits_A, *grid),
            fake_quantize(self.B.T, self.bits_B, *grid).T,
            self.scaling,
        )

    def extra_repr(self) -> str:
        grid = f"group of {self.group_size}" if self.granularity == "group" else self.granularity
        return f"{super().extra_repr()}, bits_A={self.bits_A}, bits_B={self.bits_B}, a scale per {grid}, clip={self.clip:g}"


def quantize_after_training(model: nn.Module, **arguments: object) -> nn.Module:
    """Replace the plain LoRA layers of `model` by quantised ones with the same factors, in place.

    Args:
        model: injected with `LoRALinear`, not merged.    arguments: as `inject` passes on to `QuantizedLoRALinear`.

    Raises:
        ValueError: other layers, or an argument outside its range.    RuntimeError: the model is merged. Nothing has been
        changed then.
    """
    info, layers = injection_of(model), adapter_layers(model)
    if info.layer is not LoRALinear:
        raise ValueError(
            f"This model was injected with {info.layer.__name__}: a plain LoRALinear adapter is expected (export_peft and load_peft make one)."
        )
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise RuntimeError(
            f"{merged[0]!r} is merged: its ΔW would stay in the base. Call unmerge(model) first."
        )
    QuantizedLoRALinear(nn.Linear(1, 1), 1, 1, **arguments)  # raises before anything has changed
    state, training = factor_state(model), model.training
    inject(unload(model), info.config, layer=QuantizedLoRALinear, **arguments)
    return use_adapter(model, state).train(training)


def save_quantized(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapter of `model` to `folder/quantized.safetensors` as packed integers and scales; the base is not in it.

    One file: `<module>.A.codes` and `<module>.B.codes` uint8 (see `pack`; rows are components, so B is transposed),
    `….scale` fp32; a factor with 32 bits as it is, `<module>.A`, `<module>.B`. What it takes to read them stands in the
    file's metadata. To go on training, keep the fp32 parameters too: `save_adapter`.

    Returns:
        The file's path.

    Raises:
        ValueError: other layers than `QuantizedLoRALinear`, or factors that are not finite.
    """
    info, layers = injection_of(model), adapter_layers(model)
    if info.layer is not QuantizedLoRALinear:
        raise ValueError(
            f"This model was injected with {info.layer.__name__}: call quantize_after_training(model, bits=…) first, or use save_adapter."
        )
    tensors: AdapterState = {}
    for name, layer in layers.items():
        for key, rows, bits in (("A", layer.A, layer.bits_A), ("B", layer.B.T, layer.bits_B)):
            rows = rows.detach().float().cpu()
            if not rows.isfinite().all():
                raise ValueError(
                    f"{name}.{key} is not finite, so it has no scale: the training has diverged. Nothing was written."
                )
            if bits == 32:
                tensors[f"{name}.{key}"] = rows.contiguous()
                continue
            codes, scale = quantize(rows, bits, layer.granularity, layer.group_size, layer.clip)
            tensors |= {f"{name}.{key}.codes": pack(codes, bits), f"{name}.{key}.scale": scale}
    first = next(iter(layers.values()))
    description = {
        "format_version": FORMAT_VERSION,
        "grid": {
            key: getattr(first, key) for key in ("bits_A", "bits_B", "granularity", "group_size")
        },
        "use_rslora": first.use_rslora,
        "layers": {
            name: {key: getattr(layer, key) for key in LAYER_FIELDS}
            for name, layer in layers.items()
        },
        "base": {
            "name": getattr(model, "name_or_path", ""),
            "fingerprint": base_fingerprint(layers),
        },
        "tensors_sha256": _hash(tensors),
    }
    path = make_folder(folder) / FILE
    replace_file(path, save(tensors, metadata={"lora_course": json.dumps(description)}))
    return path


def load_quantized(model: nn.Module, folder: str | Path) -> nn.Module:
    """Inject into the plain `model` what `save_quantized` wrote, as plain `LoRALinear` with factors codes · scale.

    They are the factors that the saved model computed with, bit for bit up to 8 bits, and are not rounded again.

    Raises:
        FileNotFoundError: no such file.    ValueError: no file of `save_quantized`, a later version, damaged, or for other
        modules or shapes than the model's. The model is then as it was.

    Warns:
        UserWarning: the base's weights are not those the adapter was trained on.
    """
    description, tensors = _read(Path(folder) / FILE)
    grid, layers = description["grid"], description["layers"]
    state: AdapterState = {}
    for name, layer in layers.items():
        state[f"{name}.scaling"] = torch.tensor(layer["scaling"], dtype=torch.float64)
        for key, length, bits in (
            ("A", layer["in_features"], grid["bits_A"]),
            ("B", layer["out_features"], grid["bits_B"]),
        ):
            if bits == 32:
                rows = tensors[f"{name}.{key}"]
            else:
                codes = unpack(tensors[f"{name}.{key}.codes"], bits, (layer["r"], length))
                rows = dequantize(
                    codes, tensors[f"{name}.{key}.scale"], grid["granularity"], grid["group_size"]
                )
            state[f"{name}.{key}"] = rows if key == "A" else rows.T.contiguous()
    first = next(iter(layers.values()))
    config = LoraConfig(
        r=first["r"],
        lora_alpha=first["lora_alpha"],
        use_rslora=description["use_rslora"],
        target_modules=sorted(layers),
        rank_pattern={
            name: layer["r"] for name, layer in layers.items() if layer["r"] != first["r"]
        },
        alpha_pattern={
            name: layer["lora_alpha"]
            for name, layer in layers.items()
            if layer["lora_alpha"] != first["lora_alpha"]
        },
    )
    inject(model, config)
    try:
        use_adapter(model, state)
    except Exception:
        unload(model)
        raise
    base, expected = base_fingerprint(adapter_layers(model)), description["base"]["fingerprint"]
    if base and expected and base != expected:
        warn = f"The base's weights are not those that the adapter in {folder} was trained on ({description['base']['name']!r})."
        warnings.warn(
            f"{warn} That is expected when a 4-bit base is replaced by its 16-bit original.",
            stacklevel=2,
        )
    return model


def check_grid(bits: int, granularity: str, group_size: int, clip: float) -> None:
    """Raise ValueError, in one sentence, unless the arguments of `fake_quantize` make a grid."""
    if not isinstance(bits, int) or bits not in (*range(2, 17), 32):
        hint = " (a symmetric range of 1 bit holds nothing but 0)" if bits == 1 else ""
        raise ValueError(
            f"bits={bits!r}{hint}: a whole number from 2 to 16 is expected, or 32 for a factor that is not quantised."
        )
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"granularity={granularity!r}: one of {', '.join(GRANULARITIES)} is expected."
        )
    if not isinstance(group_size, int) or group_size < 1:
        raise ValueError(
            f"group_size={group_size!r}: how many numbers share a scale, 1 or more, is expected; 64 is usual."
        )
    if not 0 < clip <= 1:
        raise ValueError(
            f"clip={clip!r}: the part of the largest number at which the grid ends, in (0, 1], is expected; 1 cuts nothing."
        )


def _top(bits: int) -> int:
    """q, the largest code."""
    return 2 ** (bits - 1) - 1


def _round(
    x: Tensor, bits: int, granularity: str, group_size: int, clip: float
) -> tuple[Tensor, Tensor]:
    """round(x / Δ) `[scales, numbers]`, not yet cut to the range, and Δ `[scales, 1]`; both fp32, NaN where x is not finite."""
    groups = _group(x.float(), granularity, group_size)
    scale = (groups.abs().amax(1, keepdim=True) * clip / _top(bits)).clamp_(
        min=torch.finfo(torch.float32).tiny
    )
    scale = (scale.view(torch.int32) + 0xFF & ~0xFF).view(
        torch.float32
    )  # 16 bits, rounded up: with clip 1 no number is outside
    return (groups / scale).round_(), scale


def _group(x: Tensor, granularity: str, group_size: int) -> Tensor:
    """`[rows, length]` → `[scales, numbers that share a scale]`, the last group of a row filled up with zeros."""
    if granularity == "tensor":
        return x.reshape(1, -1)
    size = x.shape[1] if granularity == "channel" else min(group_size, x.shape[1])
    missing = -x.shape[1] % size
    return (F.pad(x, (0, missing)) if missing else x).reshape(-1, size)


def _ungroup(groups: Tensor, shape: torch.Size) -> Tensor:
    return groups.reshape(shape[0], -1)[:, : shape[1]]


def _hash(tensors: AdapterState) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict, AdapterState]:
    """The description and tensors of a file, checked."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: a folder written by save_quantized is expected."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = (
                file.metadata() or {},
                {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
            )
    except SafetensorError as error:
        raise ValueError(
            f"{path} can't be read ({error}): it is cut short or no safetensors file. Copy it again."
        ) from None
    if "lora_course" not in metadata:
        raise ValueError(f"{path} was not written by save_quantized: it describes no adapter.")
    description = json.loads(metadata["lora_course"])
    if description["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {description['format_version']}, this package reads {FORMAT_VERSION}: update lora-course."
        )
    if _hash(tensors) != description["tensors_sha256"]:
        raise ValueError(
            f"{path} is damaged: its tensors are not those that it describes. Copy it again."
        )
    return description, tensors
