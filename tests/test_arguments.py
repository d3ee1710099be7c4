"""`lora_course.arguments`: defaults that suit an adapter, and a user's own that win."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_course.arguments import device_of, one_device, training_arguments
from lora_course.injection import inject
from tests.models import config, qwen


def test_a_field_that_is_given_wins(tmp_path: Path) -> None:
    made = training_arguments(tmp_path, device="cpu", learning_rate=1e-3, save_total_limit=None)
    assert made.learning_rate == 1e-3 and made.save_total_limit is None
    assert made.use_cpu and made.report_to == [] and not made.fp16


def test_a_model_is_not_moved_to_where_the_arguments_train(tmp_path: Path) -> None:
    model = inject(qwen(), config())
    on_gpu = SimpleNamespace(device=torch.device("cuda"), _n_gpu=2)
    with pytest.raises(ValueError, match=r"the model is on cpu .* cuda: .*device='cpu'"):
        one_device(model, on_gpu)
    on_cpu = SimpleNamespace(device=torch.device("cpu"), _n_gpu=0)
    one_device(model, on_cpu)
    assert on_cpu._n_gpu == 1
    model._hf_hook = SimpleNamespace(execution_device="cuda:0")  # offloaded: it computes on the GPU
    one_device(model, on_gpu)
    assert on_gpu._n_gpu == 1 and device_of(model) == torch.device("cuda:0")
