"""`lora_course.processes`: real launches of two processes (gloo, on the CPU), against one process at the same global batch."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_course import processes
from tests import distributed, sharded
from tests.processes import ROOT

pytestmark = pytest.mark.slow

CURVE = {"rel": 0, "abs": 1e-5}
"""In nats, of losses of about 5: sums of two halves are rounded otherwise than sums of a whole, and AdamW divides a gradient near
zero by its own size. Found are 1e-6."""
STATE = 1e-5
"""For the same reason; found are 5e-8 after eight steps, each of which moves a number by up to 5e-3."""
KILLED = {"growth": 6, "replay": 3}
"""Cases of which one process is killed, and after which step."""


def launch(module: str, *arguments: str, shot_at: int = 0) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` with two processes on the CPU."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
        "--main_process_port", str(port), "-m", module, *arguments,
    ]  # fmt: skip
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true", "SHOT_AT": str(shot_at), "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600
    )


def launched(module: str, *arguments: str) -> None:
    run = launch(module, *arguments)
    assert run.returncode == 0, run.stderr[-4000:]


def results(folder: Path, name: str) -> list[distributed.Result]:
    """What each of two processes came to."""
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]


def assert_same_run(found: distributed.Result, expected: distributed.Result) -> None:
    assert found["curves"].keys() == expected["curves"].keys()
    for key, values in expected["curves"].items():
        assert found["curves"][key] == pytest.approx(values, nan_ok=True, **CURVE), key
    assert found["decisions"] == expected["decisions"]
    assert_close(found["state"], expected["state"])


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        atol = STATE if tensor.is_floating_point() else 0
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=atol, msg=key)


@pytest.fixture(scope="module")
def both(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, dict[str, distributed.Result]]:
    """The folders of two processes and of one, and what the one came to."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    launched("tests.distributed", str(two), *distributed.CASES)
    return two, one, {name: case(one / name) for name, case in distributed.CASES.items()}


@pytest.mark.parametrize("name", distributed.CASES)
def test_two_processes_train_what_one_does_and_decide_the_same(
    name: str, both: tuple[Path, Path, dict[str, distributed.Result]]
) -> None:
    two, _, expected = both
    first, second = results(two, name)
    assert first["decisions"] == second["decisions"]
    for key, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][key]), key
    assert_same_run(first, expected[name])
    assert not list(two.rglob("*.unfinished"))


def test_decisions_are_of_the_kind_that_could_differ(
    both: tuple[Path, Path, dict[str, distributed.Result]],
) -> None:
    _, _, expected = both
    for name in ("adalora", "gates"):
        assert len(set(expected[name]["decisions"].values())) > 1
    assert len(expected["growth"]["decisions"]) == 3  # the start, and two growths


def last_half_removed(folder: Path, name: str) -> None:
    """Takes from a finished run what it wrote in its second half."""
    if (folder / "continual.json").is_file():
        record = json.loads((folder / "continual.json").read_text())
        record["stages"], record["matrix"] = 2, record["matrix"][:2]
        (folder / "continual.json").write_text(json.dumps(record))
        shutil.rmtree(folder / "stage-2")
    elif (folder / "stage-1").is_dir():
        shutil.rmtree(folder / "stage-1")
    else:
        shutil.rmtree(folder / f"checkpoint-{distributed.STEPS}")
    assert any(folder.iterdir()), name


@pytest.fixture(scope="module")
def gone_on(
    both: tuple[Path, Path, dict[str, distributed.Result]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """What two processes have gone on with, in one launch for all: "halves" of one process's runs, and runs "killed"."""
    _, one, _ = both
    folder = tmp_path_factory.mktemp("gone on")
    for name in distributed.CASES:
        shutil.copytree(one / name, folder / "halves" / name)
        last_half_removed(folder / "halves" / name, name)
    for name, step in KILLED.items():
        run = launch("tests.distributed", str(folder), f"killed/{name}", shot_at=step)
        assert run.returncode != 0 and f"exitcode  : -{signal.SIGKILL:d}" in run.stderr, run.stderr
        assert not list((folder / "killed").glob(f"{name}-*.pt"))  # no process came to its end
    halves, killed = (
        [f"{part}/{name}" for name in names]
        for part, names in (("halves", distributed.CASES), ("killed", KILLED))
    )
    launched("tests.distributed", str(folder), *halves, *killed)
    return folder


def test_a_run_of_two_goes_on_in_one_and_of_one_in_two(
    both: tuple[Path, Path, dict[str, distributed.Result]], gone_on: Path, tmp_path: Path
) -> None:
    two, _, expected = both
    for name, case in distributed.CASES.items():
        shutil.copytree(two / name, tmp_path / name)
        last_half_removed(tmp_path / name, name)
        assert_same_run(case(tmp_path / name), expected[name])
        for found in results(gone_on / "halves", name):
            assert_same_run(found, expected[name])


@pytest.mark.parametrize("name", KILLED)
def test_one_process_is_killed_and_the_same_command_goes_on(
    name: str, both: tuple[Path, Path, dict[str, distributed.Result]], gone_on: Path
) -> None:
    two, _, _ = both
    whole, resumed = results(two, name), results(gone_on / "killed", name)
    for one, other in zip(whole, resumed, strict=True):
        assert one["curves"] == other["curves"] and one["decisions"] == other["decisions"]
        for key, tensor in one["state"].items():
            assert torch.equal(tensor, other["state"][key]), key


def test_fsdp_trains_saves_resumes_and_exports_what_one_process_does(tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    launched("tests.sharded", str(two))
    for name in sharded.MODELS:
        expected = sharded.fit(name, one)
        for found in results(two, name):
            assert found["losses"] == pytest.approx(expected["losses"], **CURVE)
            assert found["kept"] == expected["kept"]
            assert_close(found["state"], expected["state"])
        if name != "experts":
            files = [folder / f"{name}-peft/adapter_model.safetensors" for folder in (two, one)]
            assert_close(*map(load_file, files))


def test_in_one_process_nothing_is_waited_for() -> None:
    assert processes.count() == 1 and processes.is_first()
    assert processes.from_first(lambda: 3) == 3
    with processes.one_writer() as mine:
        assert mine
    tensor = torch.ones(2)
    assert processes.sum_over_processes(tensor) is tensor
    assert processes.average_gradient(torch.nn.Parameter(tensor)) is None
