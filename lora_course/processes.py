"""Several processes that train one model: what one of them decides or writes, and the others take over or wait for.

Each function is harmless in a single process. All processes call it, or none: it waits for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn

Value = TypeVar("Value")


def count() -> int:
    """How many processes train together; 1 where there is only this one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return count() == 1 or dist.get_rank() == 0


def wait() -> None:
    """Goes on when every process has come so far."""
    if count() > 1:
        dist.barrier()


def from_first(call: Callable[[], Value]) -> Value:
    """What `call` gives in the first process, in all of them; what it raises there is raised everywhere.

    For what is read from files that another process may be about to change: all must see the same.
    """
    if count() == 1:
        return call()
    answer: list = [None, None]
    if is_first():
        try:
            answer[0] = call()
        except Exception as error:  # the others would wait for an answer that never comes
            answer[1] = error
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


@contextmanager
def one_writer() -> Iterator[bool]:
    """Whether this process is the one that writes. The block begins when all have come so far, and ends when it is written.

    with one_writer() as mine:
        if mine: …
    """
    wait()
    yield is_first()
    wait()


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of `tensor` (without a gradient) over all processes; a copy if there are several."""
    if count() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def average_gradient(parameter: nn.Parameter) -> object | None:
    """From now on the gradient of `parameter` is the mean over all processes: for one that `DistributedDataParallel` does
    not know, since it came after the model was wrapped. A mean of means is the same mean, so that accumulated gradients
    are right too.

    Returns:
        What has a method `remove()` that ends it; None in a single process.
    """
    if count() == 1:
        return None

    def average(owner: Tensor) -> None:
        assert owner.grad is not None, "the hook is called when there is one"
        dist.all_reduce(owner.grad)
        owner.grad /= count()

    return parameter.register_post_accumulate_grad_hook(average)
