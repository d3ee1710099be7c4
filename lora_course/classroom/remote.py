"""A student's function in its sandbox, as a function of the judge's: arguments go out, results and gradients come back."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from lora_course.classroom.calls import Answer, Mistake, Unanswered
from lora_course.classroom.sandbox import Ended, Sandbox
from lora_course.classroom.wire import Opaque


class Remote(Answer):
    """The answer to one problem, in its sandbox. `seconds` is for all calls of the problem together.

    A call copies back what the function did to lists, dictionaries and tensors. A result that came with a graph has one
    here too: its gradient is asked of the sandbox, as a product with the upstream gradient.

    trouble: why the student's code has no such function; "" where it has.
    ended: whether its process is of no more use.
    """

    def __init__(self, box: Sandbox, opening: dict[str, Any], seconds: float) -> None:
        self.box, self.budget, self.ended = box, box.budget(seconds), False
        self.trouble = _clean(self._ask(opening).get("trouble"), 200)

    def call(
        self, arguments: dict[str, Any], draws: bool = False, largest: int | None = None
    ) -> Any:
        values = list(arguments.values())
        reply = self._ask({"kind": "call", "arguments": values})
        after = reply.get("after")
        if not isinstance(after, list) or len(after) != len(values):
            self._end("What it sends is no answer.")
        for given, changed in zip(values, after, strict=True):
            put_back(given, changed)
        result = reply.get("result")
        if isinstance(result, Opaque) and result.name == "ellipsis":
            return None
        leaves = [x for x in values if isinstance(x, Tensor) and x.requires_grad]
        return self._connect(result, leaves)

    def close(self) -> None:
        """Ends the problem: the sandbox is ready for the next."""
        self.budget = self.box.budget(5)
        self._ask({"kind": "close"})

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            reply = self.box.ask(message, self.budget)
        except Ended as ended:
            self._end(str(ended))
        if not isinstance(reply, dict):
            self._end("What it sends is no answer.")
        if "closed" in reply and message["kind"] != "close":
            self._end("Its process ended in the middle of a call: an exit, a crash, or no memory.")
        if reply.get("error") == "NotImplementedError" and not reply.get("text"):
            raise Unanswered
        if "error" in reply:
            raise Mistake(
                f"Your function stops{_clean(reply.get('where'), 40)} with "
                f"{_clean(reply['error'], 50)}: {_clean(reply.get('text'), 160)}"
            )
        return reply

    def _end(self, reason: str) -> NoReturn:
        self.ended = True
        raise Ended(reason)

    def _connect(self, result: Any, leaves: list[Tensor]) -> Any:
        """The result, whose tensors with a gradient know the way to the sandbox."""
        values = list(result) if isinstance(result, list | tuple) else [result]
        places = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.requires_grad]
        if not leaves or not places:
            return result
        ask = self._ask

        class Far(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
                return tuple(values[i].detach().clone() for i in places)

            @staticmethod
            def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
                answer = ask({"kind": "gradients", "upstream": list(upstream)})
                found: Any = answer.get("gradients")
                fits = isinstance(found, list) and len(found) == len(leaves)
                if not fits or any(
                    g is not None and (not isinstance(g, Tensor) or g.shape != x.shape)
                    for g, x in zip(found, leaves, strict=True)
                ):
                    raise Mistake("What your function returns has no gradient of the right shape.")
                return tuple(found)

        for i, far in zip(places, Far.apply(*leaves), strict=True):
            values[i] = far
        return type(result)(values) if isinstance(result, list | tuple) else values[0]


def put_back(given: Any, changed: Any) -> None:
    """Does to `given` in place what the function did to its copy."""
    if isinstance(given, Tensor) and isinstance(changed, Tensor):
        if given.shape == changed.shape and not torch.equal(given.detach(), changed.detach()):
            given.data.copy_(changed.detach())
        elif given.shape != changed.shape:
            given.data = changed.detach().clone()
    elif isinstance(given, list) and isinstance(changed, list):
        if len(given) == len(changed):
            for i, (one, other) in enumerate(zip(given, changed, strict=True)):
                if type(one) is type(other) and isinstance(one, Tensor | list | dict):
                    put_back(one, other)
                else:
                    given[i] = other
        else:
            given[:] = changed
    elif isinstance(given, dict) and isinstance(changed, dict):
        for key in [key for key in given if key not in changed]:
            del given[key]
        for key, value in changed.items():
            if (
                key in given
                and type(given[key]) is type(value)
                and isinstance(value, Tensor | list | dict)
            ):
                put_back(given[key], value)
            else:
                given[key] = value


def _clean(text: Any, most: int) -> str:
    return "".join(c if c.isprintable() else " " for c in str("" if text is None else text)[:most])
