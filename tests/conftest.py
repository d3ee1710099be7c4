"""What every test shares: which markers run where. A skipped test says what it lacks."""

import gc
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import torch

from tests import chromium
from tests.order import deal


def pytest_configure(config: pytest.Config) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:  # they share the cores, and so does what their tests start
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


@pytest.hookimpl(trylast=True)  # what markers leave out is gone by then
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        items[:] = deal(items, workers, lambda item: item.path, is_long)
    browser = bool(chromium.executable()) or os.environ.get("REQUIRE_BROWSER") == "1"
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: nvidia-smi lists none"))
        if item.get_closest_marker("browser") and not browser:
            item.add_marker(
                pytest.mark.skip(reason=f"needs one of {', '.join(chromium.NAMES)} on the PATH")
            )


def is_long(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None


def pytest_collection_finish() -> None:
    """What was imported is kept out of the garbage collection that ends each training: a third of a second of hundreds of them."""
    gc.collect()
    gc.freeze()


def has_gpu() -> bool:
    program = shutil.which("nvidia-smi")
    return bool(program) and subprocess.run(
        [program, "-L"], capture_output=True, check=False
    ).stdout.startswith(b"GPU")


@pytest.fixture(scope="session")
def chromium_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Chromium]:
    """One for all tests of a worker: a page opens in half the time where its scripts are in the cache already."""
    process = chromium.Chromium(tmp_path_factory.mktemp("profile"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On tensors this small two threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uncompiled(one_thread: None) -> Iterator[None]:
    """One thread, and no compiling: bitsandbytes has a compiled fallback for odd widths, seconds for each shape, and
    computes the same without."""
    import torch._dynamo  # seconds, which only these tests need to spend

    disabled = torch._dynamo.config.disable
    torch._dynamo.config.disable = True
    yield
    torch._dynamo.config.disable = disabled
