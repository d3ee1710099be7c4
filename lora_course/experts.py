"""Several LoRA adapters on one base, mixed by a trained router: one base pass and two products, whatever their number.

    y = W₀ x + b + s · Σ_e g_e B_e A_e x = W₀ x + b + s · B (g ∘ A x),   g = softmax(W_r h / ‖h‖),   Σ_e g_e = 1

All experts of a layer lie in one pair, `A` `[Σ r_e, in]` and `B` `[out, Σ r_e]`; a gate multiplies its expert's part of `A x`.
A *router* computes the gates from the hidden state h that enters its decoder block (one router a block, shared by the
block's layers), or from the embedding that enters the first one (one router for the model): by token, or once a
sequence, from the sequence's first tokens.

Sources: mixtures of LoRA experts, arXiv 2402.07148 (X-LoRA), 2312.09979 (LoRAMoE), 2404.15159 (MixLoRA); the balance
loss, arXiv 2101.03961 (Switch Transformers).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F

from lora_course.checkpoint import load_adapter
from lora_course.export import load_peft
from lora_course.injection import adapter_layers, inject, injection_of, unload
from lora_course.lora import AdapterState, LoRALinear, register
from lora_course.states import adapter_state, concatenate, factor_state, split_state, use_adapter

# A module's path up to the first numbered block: decoder, stack, number.
BLOCK = re.compile(r"(?:(.*?)\.)??(\w+)\.(\d+)\.")


@register
class ExpertsLinear(LoRALinear):
    """`y = base(x) + scaling · Σ_e g_e B_e A_e dropout(x)`; the gates g come from this layer's `Router`.

    Beside `LoRALinear`'s arguments, of which r, lora_alpha and the initialisation are each expert's:

    Args:
        num_experts: E, ≥ 1.
        routing: "layer" (a router for each decoder block) or "shared" (one for the model).
        gate_by: "token", or "sequence": one set of gates from a sequence's first `prefix` real tokens, for all tokens after
            them; those of the prefix itself get equal gates, and need not be scored (`mask_prefix`).
        top_k: keep the k largest gates, divided by their sum, 2 ≤ k ≤ E; None keeps all. All experts are computed either way.
        prefix: tokens that a sequence gate looks at, ≥ 1.
        train_experts: False freezes A and B, so that only routers train (`freeze_experts`).

    Attributes:
        A: `[Σ r_e, in]`.    B: `[out, Σ r_e]`.    ranks: `[E]`, r_e.    r: the largest of them.
        router: `[E, width of the model]`, fp32; only in the first layer of each place that has a router.

    Raises:
        ValueError: arguments outside these ranges. `factors`, `delta_weight` and `merge` raise: no fixed matrix is added.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        num_experts: int = 4,
        routing: str = "layer",
        gate_by: str = "token",
        top_k: int | None = None,
        prefix: int = 16,
        train_experts: bool = True,
    ) -> None:
        _check_arguments(num_experts, routing, gate_by, top_k, prefix)
        plain = (base_layer, r, lora_alpha, lora_dropout, use_rslora, init_lora_weights)
        super().__init__(*plain)
        # Each expert starts as a LoRA layer starts.
        self.A = nn.Parameter(
            torch.cat([self.A, *(LoRALinear(*plain).A for _ in range(num_experts - 1))]).detach()
        )
        self.B = nn.Parameter(self.B.detach().repeat(1, num_experts))
        self.register_buffer("ranks", torch.full((num_experts,), r, device=self.A.device))
        self.register_load_state_dict_post_hook(_take_largest_rank)
        self.num_experts, self.routing, self.gate_by = num_experts, routing, gate_by
        self.top_k, self.prefix, self.train_experts = top_k, prefix, train_experts
        self.gating: Router | None = None  # one object for all layers of a place; `connect` sets it

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[..., in]` → `[..., out]`, as `LoRALinear`; the gates are those of the block's latest input."""
        y = self.base_layer(x)
        return self.add_update(y, x, self.A, self.B, self.scaling) if self.enabled else y

    def transform_hidden(self, h: Tensor) -> Tensor:
        """`h` `[..., Σ r_e]` → the same with each expert's part times its gate."""
        gates = self.gating.gates if self.gating else None
        if gates is None or gates[..., 0].numel() != h[..., 0].numel():
            seen = "no input" if gates is None else f"an input of {list(gates.shape[:-1])} tokens"
            raise RuntimeError(
                f"An ExpertsLinear got an input {list(h.shape[:-1])}, but its router has seen {seen}: gates are computed where "
                "a decoder block begins, for all its tokens. Run the model, not the layer, and adapt no layer that sees only some tokens."
            )
        if gates.requires_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                "Reentrant gradient checkpointing would lose the router's gradient: call "
                "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
            )
        equal = h.shape[-1] == self.r * self.num_experts  # r is the largest rank
        return Weigh.apply(
            h, gates.to(h.device).reshape(*h.shape[:-1], -1), self.r if equal else self.ranks
        )

    @classmethod
    def after_inject(cls, model: nn.Module, layers: dict[str, LoRALinear]) -> None:
        """Give each block, or the model, its router, and hook it to the block's input."""
        places = {name: BLOCK.match(name) for name in layers}
        stacks = {(m[1] or "", m[2]) if m else None for m in places.values()}
        config = getattr(model, "config", None)
        if None in stacks or len(stacks) > 1 or config is None:
            raise ValueError(
                "Experts need a language model with one stack of numbered decoder blocks and a config that states their width; "
                f"{min(layers)!r} … {max(layers)!r} are not all inside one. Choose target_modules inside the blocks."
            )
        ((decoder_name, stack),) = stacks
        decoder, width = model.get_submodule(decoder_name), config.get_text_config().hidden_size
        first = next(iter(layers.values()))
        current = Pass(first)
        current.handles += [decoder.register_forward_pre_hook(current.begin, with_kwargs=True)]
        blocks = getattr(decoder, stack)
        routers: dict[str, Router] = {}
        for name, layer in layers.items():
            shared = layer.routing == "shared"
            place = f"{places[name][0]}"[:-1] if not shared else stack
            if place not in routers:
                layer.router = nn.Parameter(
                    torch.randn(layer.num_experts, width, device=layer.A.device) * 0.02
                )
                layer.router.requires_grad_(layer.A.requires_grad)
                routers[place] = Router(place, layer, current)
                block = blocks[0 if shared else int(places[name][3])]
                current.handles.append(
                    block.register_forward_pre_hook(routers[place].enter, with_kwargs=True)
                )
            layer.gating = routers[place]
            if not layer.train_experts:
                layer.A.requires_grad_(False)
                layer.B.requires_grad_(False)

    @classmethod
    def before_unload(cls, model: nn.Module, layers: dict[str, LoRALinear]) -> None:
        """Take the hooks off the model."""
        for current in {layer.gating.current for layer in layers.values() if layer.gating}:
            for handle in current.handles:
                handle.remove()

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Refused: what this layer adds depends on its input."""
        raise NotImplementedError(
            "The update of ExpertsLinear depends on the input through the router, so no fixed matrix B A equals it, and it can be "
            "neither merged nor exported as LoRA. One expert can: expert_state(model, i). So can a fixed mixture: states.concatenate."
        )

    def check_merge(self, name: str) -> None:
        """Refused, as `factors`."""
        self.factors()

    def load_tensors(self, tensors: AdapterState) -> None:
        """As `LoRALinear.load_tensors`, with ranks that may differ between experts."""
        super().load_tensors(tensors)
        self.lora_alpha *= int(self.ranks.max()) / self.r
        self.r = int(self.ranks.max())

    def check_tensors(self, name: str, tensors: AdapterState) -> None:
        """As `LoRALinear.check_tensors`, with the number of experts."""
        super().check_tensors(name, tensors)
        ranks = tensors["ranks"]
        if ranks.shape != self.ranks.shape or int(ranks.sum()) != tensors["A"].shape[0]:
            raise ValueError(
                f"The adapter holds {ranks.numel()} experts of ranks {ranks.tolist()} for {name!r}, {tensors['A'].shape[0]} rows of A in all; "
                f"this model has {self.num_experts} experts: inject with num_experts={ranks.numel()}."
            )

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, experts={self.num_experts}, {self.routing}, by {self.gate_by}"
        )


class Weigh(torch.autograd.Function):
    """`h` `[..., Σ r_e]` and gates `[..., E]` → h with each expert's part times its gate.

    Its own function for the check in `backward`: where checkpointing computes a block again, it must find the same gates.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, gates: Tensor, ranks: Tensor | int) -> Tensor:
        ctx.save_for_backward(h, gates)
        ctx.first, ctx.ranks = gates.detach(), ranks
        return h * spread(gates.to(h.dtype), ranks, h.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        h, gates = ctx.saved_tensors
        if gates.data_ptr() != ctx.first.data_ptr() and not torch.equal(gates, ctx.first):
            raise RuntimeError(
                "Gradient checkpointing computed this block again with the gates of a later forward pass: call backward() before the "
                "next forward pass with experts, or switch checkpointing off."
            )
        own = spread(
            torch.eye(gates.shape[-1], dtype=h.dtype, device=h.device), ctx.ranks, h.shape[-1]
        )  # [E, Σ r_e]: whose part is whose
        return (
            grad * spread(gates.to(h.dtype), ctx.ranks, h.shape[-1]),
            ((grad * h) @ own.t()).to(gates.dtype),
            None,
        )


def _take_largest_rank(layer: ExpertsLinear, *_: object) -> None:
    layer.r = int(layer.ranks.max())


def spread(gates: Tensor, ranks: Tensor | int, width: int) -> Tensor:
    """`[..., E]` → `[..., Σ r_e]`: each gate r_e times. ranks: `[E]`, or one number if they are equal.    width: Σ r_e."""
    if isinstance(ranks, int):
        return gates[..., None].expand(*gates.shape, ranks).reshape(*gates.shape[:-1], width)
    return gates.repeat_interleave(ranks, -1, output_size=width)


class Pass:
    """What routers must know of the model's latest forward pass besides hidden states: which tokens are real, which of
    them are in the prefix, and how many of the prefix the cache holds already."""

    def __init__(self, layer: ExpertsLinear) -> None:
        self.layer = layer
        self.handles: list[Any] = []
        self.real = self.inside = self.cached = None

    def begin(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the decoder."""
        if not self.layer.enabled:
            return
        given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
        tokens = (
            given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        )
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        rows, length = tokens.shape[:2]
        past = int(cache.get_seq_length()) if cache is not None else 0
        if mask is not None and (
            not isinstance(mask, Tensor) or mask.shape != (rows, past + length)
        ):
            if self.layer.gate_by == "sequence":
                raise ValueError(
                    f"A sequence gate counts real tokens in an attention_mask [{rows}, {past + length}] (batch, tokens with those "
                    f"in the cache); it got {list(getattr(mask, 'shape', [type(mask).__name__]))}. Leave it out if nothing is padded."
                )
            mask = None
        if mask is None:
            mask = torch.ones(rows, past + length, dtype=torch.bool, device=tokens.device)
        self.real = mask[:, past:].bool()
        self.inside = mask.long().cumsum(1)[:, past:] <= self.layer.prefix
        self.cached = mask[:, :past].sum(1).clamp(max=self.layer.prefix)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"real": None, "inside": None, "cached": None}


class Router:
    """The gates of one place, a decoder block or the whole model: p = softmax(W_r h / ‖h‖), and of them the k largest.

    Dividing by ‖h‖ makes a learning rate mean the same in every block, whose hidden states differ in size by far.
    For a sequence gate h / ‖h‖ is averaged over the prefix, and the mean divided by its length again.

    Attributes:
        probabilities: p before the choice, `[B, T, E]`, or `[B, 1, E]` for a sequence gate.    gates: g, `[B, T, E]`.
        fixed: gates to use instead, or None.
    """

    def __init__(self, name: str, owner: ExpertsLinear, current: Pass) -> None:
        self.name, self.owner, self.current = name, owner, current
        self.gates = self.probabilities = self.fixed = None

    def enter(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the block: compute the gates from its input `[B, T, width]`."""
        layer = self.owner
        if not layer.enabled:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        with torch.autocast(hidden.device.type, enabled=False):
            h, W = hidden.to(layer.router.device, torch.float32), layer.router.float()
            inverse = 1 / h.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            if layer.gate_by == "token":
                logits = F.linear(h, W) * inverse
            else:
                logits = F.linear(
                    F.normalize(
                        self._prefix_sum(h, inverse, kwargs.get("past_key_values")), dim=-1
                    ),
                    W,
                )
            self.probabilities = gates = logits.softmax(-1)
            if layer.top_k is not None:
                values, chosen = gates.topk(layer.top_k)
                gates = torch.zeros_like(gates).scatter(
                    -1, chosen, values / values.sum(-1, keepdim=True)
                )
            if layer.gate_by == "sequence":
                gates = torch.where(
                    self.current.inside.to(h.device)[..., None], 1 / layer.num_experts, gates
                )
            if self.fixed is not None:
                gates = self.fixed.to(h.device).expand_as(gates)
            self.gates = gates

    def _prefix_sum(self, h: Tensor, inverse: Tensor, cache: Any) -> Tensor:
        """Σ h / ‖h‖ over the prefix, `[B, 1, width]`: what the cache's own sum lacks is added to it, and kept with it."""
        in_prefix = (self.current.real & self.current.inside).to(h.device, h.dtype)
        total = torch.einsum("bt,bth->bh", in_prefix * inverse[..., 0], h)
        if cache is not None:
            if not hasattr(cache, "prefix_sums"):
                cache.prefix_sums = PrefixSums(cache)
            total = cache.prefix_sums.add(self.name, total, in_prefix.sum(1), self.current.cached)
        return total[:, None]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"gates": None, "probabilities": None}


class PrefixSums:
    """What sequence gates have seen of the sequences in a key-value cache; lies on the cache, and goes where it goes."""

    def __init__(self, cache: Any) -> None:
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        self.reorder_cache = cache.reorder_cache
        cache.reorder_cache = (
            self.reorder
        )  # beam search moves rows of the cache: these sums must move with them

    def add(self, name: str, total: Tensor, count: Tensor, expected: Tensor) -> Tensor:
        """The sum with `total` `[B, width]` over `count` `[B]` new tokens added, where `expected` `[B]` are in it already."""
        before, seen = self.sums.get(name, (torch.zeros_like(total), torch.zeros_like(count)))
        if seen.shape != expected.shape or bool((seen != expected.to(seen)).any()):
            raise RuntimeError(
                f"This cache holds {expected.tolist()} tokens of each sequence's prefix, its sequence gates have seen {seen.int().tolist()}: it was "
                "filled with the experts off, cut, or its rows were changed. Run the prompt through the model again with a new cache."
            )
        self.sums[name] = ((before + total).detach(), seen + count)
        return before + total

    def reorder(self, beam_idx: Tensor) -> None:
        """Instead of the cache's own `reorder_cache`."""
        self.reorder_cache(beam_idx)
        for name, pair in self.sums.items():
            self.sums[name] = tuple(
                tensor.index_select(0, beam_idx.to(tensor.device)) for tensor in pair
            )


def mix_experts(
    model: nn.Module,
    experts: Sequence[AdapterState | str | Path],
    train_experts: bool = False,
    **arguments: object,
) -> nn.Module:
    """Put existing adapters into the plain `model` as its experts, frozen, with routers that are ready to train.

    Args:
        model: without an adapter.
        experts: for each, a plain LoRA state (`factor_state`, `expert_state`, `concatenate`), or a folder that `save_adapter` or PEFT
            wrote. Ranks, scales and modules may differ: an expert adds nothing to a module that it lacks.
        train_experts: let the experts train too.
        arguments: `routing`, `gate_by`, `top_k`, `prefix` of `ExpertsLinear`.

    Returns:
        `model`, injected with `ExpertsLinear`. Their dropout is 0.

    Raises:
        ValueError: no expert, or one that does not fit. The model is then as it was.
    """
    if not experts:
        raise ValueError("experts is empty: give one or more adapter states or folders.")
    given = [
        expert if isinstance(expert, dict) else _read(model, Path(expert)) for expert in experts
    ]
    together, states = split_state(concatenate(given)), [split_state(state) for state in given]
    r = max(tensors["A"].shape[0] for state in states for tensors in state.values())
    config = LoraConfig(r=r, lora_alpha=r, target_modules=list(together), task_type="CAUSAL_LM")
    inject(
        model,
        config,
        ExpertsLinear,
        num_experts=len(states),
        train_experts=train_experts,
        **arguments,
    )
    mixed = adapter_state(model)
    for name, tensors in together.items():
        # The first expert's scale is kept, for training that goes on.
        scaling = next(state[name]["scaling"] for state in states if name in state)
        ranks = torch.tensor(
            [state[name]["A"].shape[0] if name in state else 0 for state in states]
        )
        new = {"A": tensors["A"], "B": tensors["B"] / scaling, "ranks": ranks, "scaling": scaling}
        mixed |= {f"{name}.{key}": tensor for key, tensor in new.items()}
    try:
        return use_adapter(model, mixed)
    except ValueError:
        unload(model)
        raise


def expert_state(model: nn.Module, index: int) -> AdapterState:
    """A copy of one expert as a plain LoRA state, for `use_adapter`, `mix_experts` or `export_peft`.

    Modules that the expert lacks are left out. Raises ValueError where there is no such expert.
    """
    state: AdapterState = {}
    for name, layer in _layers(model).items():
        if not 0 <= index < layer.num_experts:
            raise ValueError(
                f"index={index}: this model has the experts 0 to {layer.num_experts - 1}."
            )
        ranks = layer.ranks.tolist()
        rows = slice(sum(ranks[:index]), sum(ranks[: index + 1]))
        if ranks[index]:
            state |= {
                f"{name}.A": layer.A.detach()[rows].clone(),
                f"{name}.B": layer.B.detach()[:, rows].clone(),
                f"{name}.scaling": torch.tensor(layer.scaling, dtype=torch.float64),
            }
    return state


def freeze_experts(model: nn.Module, frozen: bool = True) -> nn.Module:
    """Train routers only (or, with `frozen=False`, experts and routers), also after saving and loading."""
    for layer in _layers(model).values():
        layer.train_experts = not frozen
        layer.A.requires_grad_(not frozen)
        layer.B.requires_grad_(not frozen)
    injection_of(model).arguments["train_experts"] = not frozen
    return model


def balance_loss(model: nn.Module, weight: float = 1.0) -> Tensor:
    """Switch's loss of the latest forward pass, mean over routers: `weight` · E · Σ_e f_e P_e (arXiv 2101.03961, section 2.2).

    f_e: share of the real tokens (of the sequences, for a sequence gate) whose largest gate, or k largest, is e's;
    P_e: mean probability of e. 1 where experts are used equally, E where all goes to one; only P_e has a gradient.
    For `AdapterTrainer`: `auxiliary_loss=functools.partial(balance_loss, weight=0.01)`.

    Raises RuntimeError before the first forward pass.
    """
    losses = []
    for router in _routers(model):
        p = router.probabilities
        if p is None:
            raise RuntimeError(
                "There are no gates yet: balance_loss follows a forward pass of the model."
            )
        real = (
            torch.ones_like(p[..., 0])
            if router.owner.gate_by == "sequence"
            else router.current.real.to(p)
        )
        share = (real / real.sum())[..., None]
        chosen = p.topk(router.owner.top_k or 1).indices
        f = (share * torch.zeros_like(p).scatter(-1, chosen, 1 / chosen.shape[-1])).sum((0, 1))
        losses.append(p.shape[-1] * (f * (share * p).sum((0, 1))).sum())
    return weight * torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def latest_gates(model: nn.Module) -> dict[str, Tensor]:
    """The gates of the latest forward pass, `[B, T, E]`, by the name of the block, or of the stack for a shared router."""
    return {
        router.name: router.gates.detach() for router in _routers(model) if router.gates is not None
    }


@contextmanager
def fixed_gates(model: nn.Module, gates: Tensor | Sequence[float]) -> Iterator[nn.Module]:
    """Within the block all routers give these gates: `[E]`, `[B, 1, E]` or `[B, T, E]`; one-hot ones choose one expert.

    Raises ValueError where their last dimension is not the number of experts.
    """
    gates = torch.as_tensor(gates, dtype=torch.float32)
    routers = _routers(model)
    if not gates.ndim or gates.shape[-1] != routers[0].owner.num_experts:
        raise ValueError(
            f"gates has the shape {list(gates.shape)}; [E], [B, 1, E] or [B, T, E] with E = {routers[0].owner.num_experts} is expected."
        )
    for router in routers:
        router.fixed = gates
    try:
        yield model
    finally:
        for router in routers:
            router.fixed = None


def mask_prefix(labels: Tensor, prefix: int, attention_mask: Tensor | None = None) -> Tensor:
    """A copy of `labels` `[B, T]` that scores no token of a sequence's prefix: -100 on its first `prefix` real tokens, and on padding."""
    mask = torch.ones_like(labels) if attention_mask is None else attention_mask.long()
    return labels.masked_fill((mask.cumsum(1) <= prefix) | (mask == 0), -100)


def _layers(model: nn.Module) -> dict[str, ExpertsLinear]:
    layers = adapter_layers(model)
    if other := sorted(
        {type(layer).__name__ for layer in layers.values() if not isinstance(layer, ExpertsLinear)}
    ):
        raise ValueError(
            f"This model carries {', '.join(other)}, no experts: use mix_experts, or inject with layer=ExpertsLinear."
        )
    return layers


def _routers(model: nn.Module) -> list[Router]:
    return list({id(layer.gating): layer.gating for layer in _layers(model).values()}.values())


def _read(model: nn.Module, folder: Path) -> AdapterState:
    """The plain factors of the adapter in a folder, which is put into `model` for a moment and taken out again."""
    (load_peft if (folder / "adapter_config.json").is_file() else load_adapter)(model, folder)
    try:
        return factor_state(model)
    finally:
        unload(model)


def _check_arguments(
    num_experts: int, routing: str, gate_by: str, top_k: int | None, prefix: int
) -> None:
    if not isinstance(num_experts, int) or num_experts < 1:
        raise ValueError(f"num_experts={num_experts!r}: a whole number of 1 or more is expected.")
    if routing not in ("layer", "shared"):
        raise ValueError(
            f"routing={routing!r}: 'layer' (a router for each block) or 'shared' (one for the model) is expected."
        )
    if gate_by not in ("token", "sequence"):
        raise ValueError(f"gate_by={gate_by!r}: 'token' or 'sequence' is expected.")
    if not isinstance(prefix, int) or prefix < 1:
        raise ValueError(f"prefix={prefix!r}: a whole number of tokens, 1 or more, is expected.")
    if top_k is not None and (not isinstance(top_k, int) or not 2 <= top_k <= num_experts):
        raise ValueError(
            f"top_k={top_k!r}: a whole number from 2 to num_experts={num_experts} is expected, or None for all. One expert alone gets the "
            "renormalised gate 1 whatever the router says, so the router would learn nothing."
        )
