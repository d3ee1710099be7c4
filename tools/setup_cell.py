# On Colab and Kaggle this installs the course, and leaves torch and numpy as they are.
import importlib.metadata
import os
import subprocess
import sys

home, version = "https://github.com/OWNER/REPOSITORY", "VERSION"
wheel = f"{home}/releases/download/v{version}/lora_course-{version}-py3-none-any.whl"
source = os.environ.get("LORA_COURSE_SOURCE", wheel)  # or a folder, or git+https://…
hosted = "google.colab" in sys.modules or "KAGGLE_KERNEL_RUN_TYPE" in os.environ
found = importlib.metadata.distributions
if hosted and version not in [here.version for here in found(name="lora-course")]:
    pip = [sys.executable, "-m", "pip", "install", "-qqU", "--no-deps", source]
    errors = subprocess.run(pip, capture_output=True, text=True).stderr
    importlib.invalidate_caches()
if not any(found(name="lora-course")):
    sys.exit(
        f"Nothing came from {source} ({errors.split('ERROR: ')[-1].strip()}). Switch "
        "the internet on (Kaggle: Session options) or give LORA_COURSE_SOURCE a wheel."
        if hosted
        else f'Install the course first: %pip install "{source}" (uv: !uv pip install)'
    )

from lora_course.machine.environment import prepare

prepare(version, hosted)
