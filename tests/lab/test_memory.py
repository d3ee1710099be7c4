"""Measured memory, on allocations of known size."""

import copy
import sys

import pytest
import torch
from torch import nn

from lora_course.lab.memory import peak_memory, process_peak, saved_bytes, tensor_bytes
from lora_course.qlora import quantize_model, stored_bytes

MB = 1_000_000


def test_the_peak_is_that_of_the_tensors_alive_at_once() -> None:
    def function() -> str:
        first = torch.ones(1000, 1000)  # 4 MB
        second = first + 1  # 8 MB
        del first
        third = torch.ones(500, 1000)  # 6 MB
        return f"{second.sum() + third.sum():.0f}"

    result, peak = peak_memory(function)
    assert result == "2500000"
    assert 8 * MB <= peak < 8 * MB + 1000
    assert peak_memory(function)[1] == peak


def test_work_on_the_cpu_is_measured_there_on_a_machine_with_a_gpu(monkeypatch) -> None:
    on_gpu = [100, 100]  # bytes before, and at the peak
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: on_gpu[0])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: on_gpu[1])
    assert MB <= peak_memory(lambda: torch.ones(250, 1000))[1] < MB + 1000
    on_gpu[1] = 612
    assert peak_memory(lambda: torch.ones(250, 1000))[1] == 512


def test_what_the_backward_pass_needs_is_counted_once_and_without_parameters() -> None:
    layer, x = nn.Linear(50, 30), torch.ones(20, 50)
    assert saved_bytes(layer, lambda: layer(x)) == 20 * 50 * 4
    assert saved_bytes(layer, lambda: layer(x) + layer(x)) == 20 * 50 * 4  # the same x
    learnt = torch.ones(20, 50, requires_grad=True)  # its gradient needs the weight, too
    assert saved_bytes(layer, lambda: layer(learnt)) == 20 * 50 * 4
    assert saved_bytes(layer, lambda: layer(x).exp()) == (20 * 50 + 20 * 30) * 4
    assert (
        saved_bytes(layer, lambda: [layer(x).exp().sum(), None][1]) == 0
    )  # a graph that is dropped
    with torch.no_grad():
        assert saved_bytes(layer, lambda: layer(x)) == 0


def test_freeing_what_was_there_before_does_not_hide_what_is_added() -> None:
    held = [torch.ones(1000, 1000)]

    def function() -> None:
        torch.ones(250, 1000)
        held.clear()

    assert MB <= peak_memory(function)[1] < MB + 1000


def test_memory_of_the_backward_pass_counts() -> None:
    x = torch.ones(1000, 250, requires_grad=True)
    peak = peak_memory(lambda: x.exp().sum().backward())[1]
    assert 2 * MB <= peak < 2.1 * MB  # exp's output, kept, and the gradient


def test_tensor_bytes_counts_tied_weights_once_and_buffers() -> None:
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head, nn.BatchNorm1d(10))
    assert tensor_bytes(model) == 4 * 40 + 4 * (4 * 10) + 8
    assert tensor_bytes(model.half()) == 2 * 40 + 2 * (4 * 10) + 8


def test_tensor_bytes_counts_the_constants_of_4bit_weights() -> None:
    model = nn.Sequential(nn.Linear(512, 384, bias=False))
    packed = quantize_model(copy.deepcopy(model))
    assert 512 * 384 // 2 + 512 * 384 // 64 < tensor_bytes(packed) < tensor_bytes(model) / 7
    # bitsandbytes' two codebooks are stored beside the codes and constants that the formula counts
    assert tensor_bytes(packed) - stored_bytes(packed) == 4 * (16 + 256)


HOLD = """
def hold(megabytes):
    return len(bytearray(megabytes * 1_000_000)) // 1_000_000
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures Linux's counters")
def test_a_process_of_its_own_shows_what_it_held_and_not_what_we_hold(
    tmp_path, monkeypatch
) -> None:
    (tmp_path / "holding.py").write_text(HOLD)
    monkeypatch.syspath_prepend(tmp_path)
    ours = bytearray(b"x") * (300 * MB)
    small, large = process_peak("holding:hold", 1), process_peak("holding:hold", 200)
    assert large.result == 200
    assert 190 * MB < large.grown - small.grown < 230 * MB
    assert large.peak < len(ours) + 500 * MB


def test_a_process_that_fails_and_a_name_that_is_none_say_so() -> None:
    with pytest.raises(RuntimeError, match="(?s)in its own process.*ZeroDivisionError"):
        process_peak("operator:truediv", 1, 0)
    with pytest.raises(ValueError, match="'module:function'"):
        process_peak("hold")
