"""What a chapter runs on: four profiles from a laptop's CPU to a 7B model, and the check that one fits before it starts."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from lora_course.arguments import compute_dtype

GIB = 2**30
CUDA_CONTEXT = GIB // 2  # what CUDA itself takes on a GPU before the first tensor
NANO_CONFIG = Path(__file__).resolve().parents[1] / "data" / "nano" / "config.json"


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama- or Qwen2-like model. `width` is the hidden size, `kv_width` that of keys and values together
    over their heads, `intermediate` that of the MLP."""

    layers: int
    width: int
    intermediate: int
    kv_width: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: dict) -> "Shape":
        """From a model's `config.to_dict()` or config.json."""
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            width=config["hidden_size"],
            intermediate=config["intermediate_size"],
            kv_width=config["num_key_value_heads"] * head,
            vocabulary=config["vocab_size"],
            tied=config["tie_word_embeddings"],
        )

    @property
    def linear(self) -> int:
        """Parameters of the linear layers inside the blocks, which are those that LoRA adapts and 4 bits shrink."""
        attention = 2 * self.width * (self.width + self.kv_width)
        return self.layers * (attention + 3 * self.width * self.intermediate)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the output layer where it is not tied."""
        return self.vocabulary * self.width * (1 if self.tied else 2)

    def adapter(self, r: int) -> int:
        """Parameters of LoRA of rank r on all linear layers: r·(in + out) each."""
        attention = 4 * self.width + 2 * (self.width + self.kv_width)
        return self.layers * r * (attention + 3 * (self.width + self.intermediate))


@dataclass(frozen=True)
class Profile:
    """Model, precision, device and amounts of one way to run a chapter.

    dtype: of the base's weights (and of the computation, for `quantize`). quantize: the linear layers are in 4 bits.
    batch: rows a step; length: tokens a row; steps: optimiser steps of one training; seeds: of repeated trainings.
    """

    name: str
    model: str
    shape: Shape
    dtype: torch.dtype
    quantize: bool
    device: str
    batch: int
    length: int
    steps: int
    seeds: tuple[int, ...]
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a LoRA training step, by what they are for."""

    weights: int
    adapters: int
    gradients: int
    moments: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return (
            self.weights
            + self.adapters
            + self.gradients
            + self.moments
            + self.activations
            + self.logits
        )


def estimate_memory(
    n_params: int,
    bits: float,
    *,
    adapter_params: int,
    tokens: int,
    layers: int,
    width: int,
    intermediate: int,
    vocabulary: int,
    compute_bytes: int = 4,
    embedding_params: int = 0,
    embedding_bytes: int = 4,
    moment_bytes: float = 8,
    checkpointing: bool = False,
) -> MemoryEstimate:
    """Memory of one LoRA training step on all linear layers of a Llama- or Qwen2-like model, in bytes.

    With N = `n_params` weights of `bits` bits each, E `embedding_params`, P `adapter_params`, T `tokens` a step
    (batch × length), L `layers`, d `width`, f `intermediate`, V `vocabulary` and c `compute_bytes` a number:

    - weights: N·bits/8 + E·embedding_bytes;
    - adapters and their gradients, in fp32: 4·P each; Adam's two moments: `moment_bytes`·P (8 in fp32, 2 in 8 bits);
    - activations kept for the backward pass: c·T·(8d + 4f) a layer: per block two residuals and two normed inputs (4d),
      queries, attention's output and its copy (3d), keys and values with what is small (d), and the MLP's gate, its SiLU,
      up and their product (4f). With checkpointing c·T·d a layer, and one layer's activations while it is recomputed;
    - logits: the logits (c·T·V) and, in fp32, a copy if c < 4, their log-softmax and the gradient.

    Dropout (one more mask and copy of each linear's input) and attention that stores its T×T weights are left out.
    """
    layer = compute_bytes * tokens * (8 * width + 4 * intermediate)
    logits = (
        tokens * vocabulary * (compute_bytes + 8 + (4 + compute_bytes if compute_bytes < 4 else 0))
    )
    if checkpointing:
        # A block is recomputed when the logits are gone, so only the larger of the two counts.
        activations = compute_bytes * tokens * width * layers + max(0, layer - logits)
    else:
        activations = layers * layer
    return MemoryEstimate(
        weights=int(n_params * bits / 8) + embedding_params * embedding_bytes,
        adapters=4 * adapter_params,
        gradients=4 * adapter_params,
        moments=int(moment_bytes * adapter_params),
        activations=activations,
        logits=logits,
    )


def estimate(profile: Profile, r: int = 8) -> MemoryEstimate:
    """`estimate_memory` of a profile's training step with LoRA of rank r on all linear layers."""
    shape = profile.shape
    # A 4-bit base keeps its norms and embeddings, and so what flows between the layers, in fp32.
    size = 4 if profile.quantize else profile.dtype.itemsize
    return estimate_memory(
        shape.linear,
        4.127 if profile.quantize else 8 * size,  # NF4 with double quantisation: arXiv 2305.14314
        adapter_params=shape.adapter(r),
        tokens=profile.batch * profile.length,
        layers=shape.layers,
        width=shape.width,
        intermediate=shape.intermediate,
        vocabulary=shape.vocabulary,
        compute_bytes=size,
        embedding_params=shape.embedding,
        embedding_bytes=size,
        checkpointing=profile.gradient_checkpointing,
    )


def profiles() -> dict[str, Profile]:
    """The four profiles by name, with the precision of this machine's devices."""
    gpu = compute_dtype("cuda")
    nano = Shape.of(json.loads(NANO_CONFIG.read_text()))
    return {
        profile.name: profile
        for profile in (
            Profile("tiny", "nano", nano, torch.float32, False, "cpu", 16, 128, 60, (0, 1, 2)),
            Profile(
                "smol",
                "smol",
                Shape(30, 576, 1536, 192, 49152, True),
                torch.float32,
                False,
                "cpu",
                4,
                128,
                40,
                (0, 1, 2),
            ),
            Profile(
                "t4",
                "Qwen/Qwen2.5-0.5B",
                Shape(24, 896, 4864, 128, 151936, True),
                gpu,
                False,
                "cuda",
                8,
                256,
                200,
                (0, 1, 2),
            ),
            Profile(
                "large",
                "Qwen/Qwen2.5-7B",
                Shape(28, 3584, 18944, 512, 152064, False),
                gpu,
                True,
                "cuda",
                4,
                256,
                100,
                (0,),
                True,
            ),
        )
    }


def free_memory(device: str) -> int:
    """Bytes free on a device: of the GPU, or of the machine's memory within the limit of the container, if there is one."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def needed_memory(profile: Profile, r: int = 8) -> int:
    """Bytes a profile's training needs on its device: the estimate, and CUDA's own share on a GPU."""
    return estimate(profile, r).total + (CUDA_CONTEXT if profile.device == "cuda" else 0)


def pick_profile(name: str | None = None) -> Profile:
    """The profile to run: the one named here or in LORA_COURSE_PROFILE; else, by the GPU and its free memory, `large` where
    it fits and the GPU computes in bf16 (an older one would take hours), or `t4` where that fits; else `tiny`.

    Raises ValueError for an unknown name, listing the names.
    """
    known = profiles()
    name = name or os.environ.get("LORA_COURSE_PROFILE")
    if name:
        if name not in known:
            raise ValueError(
                f"LORA_COURSE_PROFILE={name!r} is no profile; there are {', '.join(known)}"
            )
        return known[name]
    if torch.cuda.is_available():
        candidates = ("large", "t4") if compute_dtype("cuda") == torch.bfloat16 else ("t4",)
        for candidate in (known[name] for name in candidates):
            if needed_memory(candidate) <= free_memory("cuda"):
                return candidate
    return known["tiny"]


def preflight(
    profile: Profile,
    minutes: dict[str, float],
    peak_gib: dict[str, float] | None = None,
    r: int = 8,
) -> None:
    """Prints what the chapter will run on and what it will take; raises RuntimeError, before any work, if that can't be.

    minutes, peak_gib: by profile's name, what the chapter was measured to take; without a measured peak the estimate
    for LoRA of rank r stands in. It is refused when the device is missing, or has less free memory than the peak.
    """
    if profile.name not in minutes:
        raise ValueError(
            f"minutes has no entry for the profile {profile.name!r}; it has {', '.join(minutes)}"
        )
    measured = (peak_gib or {}).get(profile.name)
    need = int(measured * GIB) if measured is not None else needed_memory(profile, r)
    present = profile.device != "cuda" or torch.cuda.is_available()
    free = free_memory(profile.device) if present else 0
    device = (
        profile.device if profile.device == "cpu" or not present else torch.cuda.get_device_name()
    )
    bits = (
        f"4 bits, computing in {_name(profile.dtype)}" if profile.quantize else _name(profile.dtype)
    )
    rows = {
        "profile": profile.name,
        "model": f"{profile.model}, {(profile.shape.linear + profile.shape.embedding) / 1e6:,.1f}M parameters, {bits}",
        "device": device if present else f"{device} (missing)",
        "a training": f"{profile.steps} steps of {profile.batch} × {profile.length} tokens, {len(profile.seeds)} seed(s)",
        "takes about": f"{minutes[profile.name]:g} min",
        "peak memory": f"{need / GIB:.1f} GiB ({'measured' if measured is not None else 'estimated'}); free: {free / GIB:.1f} GiB",
    }
    print("\n".join(f"{key:<12}  {value}" for key, value in rows.items()))
    if not present:
        raise RuntimeError(
            f"the profile {profile.name!r} needs an NVIDIA GPU and torch sees none: choose a GPU runtime, "
            "or set LORA_COURSE_PROFILE=tiny to run on the CPU"
        )
    if need > free:
        raise RuntimeError(
            f"the profile {profile.name!r} needs about {need / GIB:.1f} GiB and {device} has {free / GIB:.1f} GiB free: "
            "restart other notebooks that hold memory, or set LORA_COURSE_PROFILE to a smaller profile "
            f"({', '.join(profiles())})"
        )


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
