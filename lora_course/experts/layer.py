"""The layer: all experts of one linear in one pair of factors, each part of `A x` times its gate."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from lora_course.experts.router import CurrentForward, Router
from lora_course.lora import AdapterState, LoRALinear, register

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

    ranks: Tensor
    router: nn.Parameter

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        *,
        num_experts: int = 4,
        routing: str = "layer",
        gate_by: str = "token",
        top_k: int | None = None,
        prefix: int = 16,
        train_experts: bool = True,
        **fields: Any,
    ) -> None:
        check_arguments(num_experts, routing, gate_by, top_k, prefix)
        super().__init__(base_layer, r, lora_alpha, **fields)
        # Each expert starts as a LoRA layer starts.
        more = (LoRALinear(base_layer, r, lora_alpha, **fields).A for _ in range(num_experts - 1))
        self.A = nn.Parameter(torch.cat([self.A, *more]).detach())
        self.B = nn.Parameter(self.B.detach().repeat(1, num_experts))
        self.register_buffer("ranks", torch.full((num_experts,), r, device=self.A.device))
        self.register_load_state_dict_post_hook(_take_largest_rank)
        self.num_experts, self.routing, self.gate_by = num_experts, routing, gate_by
        self.top_k, self.prefix, self.train_experts = top_k, prefix, train_experts
        # One object for all layers of a place; `after_inject` sets it.
        self.gating: Router | None = None

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
        return GateExperts.apply(
            h, gates.to(h.device).reshape(*h.shape[:-1], -1), self.r if equal else self.ranks
        )

    @classmethod
    def after_inject(cls, model: nn.Module, layers: dict[str, Any]) -> None:
        """Give each block, or the model, its router, and hook it to the block's input."""
        places = {name: found for name in layers if (found := BLOCK.match(name))}
        stacks = {(found[1] or "", found[2]) for found in places.values()}
        config = getattr(model, "config", None)
        if len(places) < len(layers) or len(stacks) != 1 or config is None:
            raise ValueError(
                "Experts need a language model with one stack of numbered decoder blocks and a config that states their width; "
                f"{min(layers)!r} … {max(layers)!r} are not all inside one. Choose target_modules inside the blocks."
            )
        ((decoder_name, stack),) = stacks
        decoder, width = model.get_submodule(decoder_name), config.get_text_config().hidden_size
        check_decoder(decoder, config, decoder_name)
        first = next(iter(layers.values()))
        current = CurrentForward(first)
        current.handles += [
            decoder.register_forward_pre_hook(current.read_inputs, with_kwargs=True)
        ]
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
                    block.register_forward_pre_hook(routers[place].compute_gates, with_kwargs=True)
                )
            layer.gating = routers[place]
            if not layer.train_experts:
                layer.A.requires_grad_(False)
                layer.B.requires_grad_(False)

    @classmethod
    def before_unload(cls, model: nn.Module, layers: dict[str, Any]) -> None:
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
        self.r = int(self.ranks.max())
        self._set_scaling(self.scaling)

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


def check_decoder(decoder: nn.Module, config: Any, name: str) -> None:
    """Raise ValueError unless every layer of the decoder's blocks sees the tokens that its `forward` is given."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            "This model has an encoder beside its decoder, whose cross-attention projects the encoder's tokens: gates are those of the "
            "decoder's, later ones included. Experts need a decoder-only language model."
        )
    if "input_ids" not in inspect.signature(decoder.forward).parameters:
        raise ValueError(
            f"{name!r} is a {type(decoder).__name__}, which is given hidden states, and routers ask the stack of blocks for its tokens and mask: "
            "experts need a language model whose stack takes input_ids (Llama, Qwen, Mistral, OPT, …)."
        )


def _take_largest_rank(layer: ExpertsLinear, *_: object) -> None:
    layer.r = int(layer.ranks.max())


class GateExperts(torch.autograd.Function):
    """`h` `[..., Σ r_e]` and gates `[..., E]` → h with each expert's part times its gate.

    Its own function for the check in `backward`: where checkpointing computes a block again, it must find the same gates.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, gates: Tensor, ranks: Tensor | int) -> Tensor:
        ctx.save_for_backward(h, gates)
        ctx.first, ctx.ranks = gates.detach(), ranks
        return h * repeat_gates(gates.to(h.dtype), ranks, h.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        h, gates = ctx.saved_tensors
        if gates.data_ptr() != ctx.first.data_ptr() and not torch.equal(gates, ctx.first):
            raise RuntimeError(
                "Gradient checkpointing computed this block again with the gates of a later forward pass: call backward() before the "
                "next forward pass with experts, or switch checkpointing off."
            )
        own = repeat_gates(
            torch.eye(gates.shape[-1], dtype=h.dtype, device=h.device), ctx.ranks, h.shape[-1]
        )  # [E, Σ r_e]: whose part is whose
        return (
            grad * repeat_gates(gates.to(h.dtype), ctx.ranks, h.shape[-1]),
            ((grad * h) @ own.t()).to(gates.dtype),
            None,
        )


def repeat_gates(gates: Tensor, ranks: Tensor | int, width: int) -> Tensor:
    """`[..., E]` → `[..., Σ r_e]`: each gate r_e times. ranks: `[E]`, or one number if they are equal.    width: Σ r_e."""
    if isinstance(ranks, int):
        return gates[..., None].expand(*gates.shape, ranks).reshape(*gates.shape[:-1], width)
    return gates.repeat_interleave(ranks, -1, output_size=width)


def check_arguments(
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
