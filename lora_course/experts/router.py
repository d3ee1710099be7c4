"""Where gates come from: a router reads the hidden state that enters a decoder block, before the block runs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from lora_course.experts.layer import ExpertsLinear


class CurrentForward:
    """What routers must know of the model's latest forward pass besides hidden states: which tokens are real, which of
    them are in the prefix, and how many of the prefix the cache holds already.

    Attributes:
        real: `[B, T]` bool.    in_prefix: `[B, T]` bool.    cached: `[B]`.    All three of the latest forward pass.
    """

    real: Tensor
    in_prefix: Tensor
    cached: Tensor

    def __init__(self, layer: ExpertsLinear) -> None:
        self.layer = layer
        self.handles: list[Any] = []

    def read_inputs(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the decoder."""
        if not self.layer.enabled:
            return
        given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
        tokens = (
            given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        )
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        positions = given.get("position_ids")
        if (
            self.layer.gate_by == "sequence"
            and positions is not None
            and bool((positions.diff(dim=-1) < 0).any())
        ):
            raise ValueError(
                "position_ids start again within a row: it holds several packed documents, and a sequence gate would route "
                "all of them by the first. Pad instead of packing, or use gate_by='token'."
            )
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
        self.in_prefix = mask.long().cumsum(1)[:, past:] <= self.layer.prefix
        self.cached = mask[:, :past].sum(1).clamp(max=self.layer.prefix)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one forward pass."""
        return {"layer": self.layer, "handles": self.handles}


class Router:
    """The gates of one place, a decoder block or the whole model: p = softmax(W_g h / ‖h‖), and of them the k largest.

    Dividing by ‖h‖ makes a learning rate mean the same in every block, whose hidden states differ in size by far.
    For a sequence gate h / ‖h‖ is averaged over the prefix, and the mean divided by its length again.

    Attributes:
        probabilities: p before the choice, `[B, T, E]`, or `[B, 1, E]` for a sequence gate.    gates: g, `[B, T, E]`.
        fixed: gates to use instead, or None.
    """

    def __init__(self, name: str, owner: ExpertsLinear, current: CurrentForward) -> None:
        self.name, self.owner, self.current = name, owner, current
        self.gates: Tensor | None = None
        self.probabilities: Tensor | None = None
        self.fixed: Tensor | None = None

    def compute_gates(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
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
                    self.current.in_prefix.to(h.device)[..., None], 1 / layer.num_experts, gates
                )
            if self.fixed is not None:
                gates = self.fixed.to(h.device).expand_as(gates)
            self.gates = gates

    def _prefix_sum(self, h: Tensor, inverse: Tensor, cache: Any) -> Tensor:
        """Σ h / ‖h‖ over the prefix, `[B, 1, width]`: what the cache's own sum lacks is added to it, and kept with it."""
        in_prefix = (self.current.real & self.current.in_prefix).to(h.device, h.dtype)
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
            total, seen = (part.index_select(0, beam_idx.to(part.device)) for part in pair)
            self.sums[name] = (total, seen)
