"""What every test shares: which markers run where. A skipped test says what it lacks."""

import os
import shutil
import subprocess

import pytest

from tests import chromium


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    browser = bool(chromium.executable()) or os.environ.get("REQUIRE_BROWSER") == "1"
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: nvidia-smi lists none"))
        if item.get_closest_marker("browser") and not browser:
            item.add_marker(
                pytest.mark.skip(reason=f"needs one of {', '.join(chromium.NAMES)} on the PATH")
            )


def has_gpu() -> bool:
    program = shutil.which("nvidia-smi")
    return bool(program) and subprocess.run(
        [program, "-L"], capture_output=True, check=False
    ).stdout.startswith(b"GPU")
