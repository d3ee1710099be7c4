"""How many bases lie on the pretended device at once, and how many tokens a step trains on, counted while a chapter runs.

meter = Meter(narrow)            # before any model is made; for the rest of the process
meter.bases(profile)             # 2.0 where two of the profile's bases lay there at once, by their weights in bytes
meter.unlike(profile)            # what the profile announces otherwise
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_course.lab.estimate import Shape
from lora_course.lab.profiles import Profile, estimate
from tools.pretended.device import plain

LITTLE = 0.1  # of a base: constants of the quantisation


class Meter:
    """Follows the linear and embedding layers of the stand-ins, and keeps what their weights took on the device.

    narrow: the stand-ins' shape; their bytes count as those of the model that they stand for. It looks when tokens enter a
    model, and when `look` is called: what comes and goes between two looks is not seen, nor is a weight that is no layer's.
    """

    def __init__(self, narrow: Shape) -> None:
        self.narrow = narrow
        self.layers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.seen: set[tuple[int, int]] = {(0, 0)}  # bytes of linear layers, of embeddings
        self.tokens = 0  # of the largest step of a training there
        nn.Linear.__new__ = self._following()
        nn.Embedding.__new__ = self._following()
        forward = nn.Embedding.forward

        def look_and_go_on(layer: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
            self.look()
            return forward(layer, ids)

        nn.Embedding.forward = look_and_go_on

    def _following(self) -> Callable[..., nn.Module]:
        def new(cls: type, *_: Any, **__: Any) -> nn.Module:  # copies are made by it too
            layer = object.__new__(cls)
            self.layers.add(layer)
            return layer

        return new

    def step(self, tokens: int) -> None:
        self.tokens = max(self.tokens, tokens)

    def look(self) -> None:
        narrow = self.narrow
        width, inside = narrow.width, {narrow.width, narrow.kv_width, narrow.intermediate}
        sizes: tuple[dict[int, int], dict[int, int]] = ({}, {})
        for layer in list(self.layers):
            weight = layer.__dict__.get("_parameters", {}).get("weight")
            if weight is None or not weight.is_cuda:
                continue
            if isinstance(layer, nn.Embedding):
                shape = {layer.num_embeddings, layer.embedding_dim}
            else:
                shape = {layer.in_features, layer.out_features}
            table = shape == {narrow.vocabulary, width}
            if not table and not (width in shape and shape <= inside):
                continue  # a part of an adapter, or nano's
            with plain():
                sizes[table][weight.data_ptr()] = weight.numel() * weight.element_size()
        self.seen.add((sum(sizes[0].values()), sum(sizes[1].values())))

    def bases(self, profile: Profile) -> float:
        """The most weights at once, as a multiple of those of the profile's base."""
        narrow, real = replace(self.narrow, tied=profile.shape.tied), profile.shape
        most = max(
            linear / narrow.linear * real.linear + table / narrow.embedding * real.embedding
            for linear, table in self.seen
        )
        return most / estimate(profile).weights

    def unlike(self, profile: Profile) -> list[str]:
        """What is announced otherwise: more bases than were held or fewer, or another largest step than was trained."""
        held, wrong = self.bases(profile), []
        if not profile.copies - 1 + LITTLE < held <= profile.copies + LITTLE:
            wrong.append(f"announces {profile.copies} bases of {profile.model} at once, and holds {held:.1f}")  # fmt: skip
        if self.tokens != profile.batch * profile.length:
            wrong.append(f"announces steps of {profile.batch} × {profile.length} tokens, and trains on {self.tokens:,} at most")  # fmt: skip
        return wrong
