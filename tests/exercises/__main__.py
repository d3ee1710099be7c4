"""What each wrong answer of a chapter is told, and which right ones are refused: `python -m tests.exercises 2_1 [seeds]`."""

import importlib
import sys
from pathlib import Path

from tests.exercises import ANSWERS


def main(chapter: str, seeds: int = 1) -> None:
    for path in sorted(Path(__file__).parent.glob(f"chapter_{chapter}*.py")):
        importlib.import_module(f"tests.exercises.{path.stem}")
    for id, answers in ANSWERS.items():
        print(f"{id}: {len(answers.wrongs)} wrong answers, {len(answers.rights)} right ones")
        judge = answers.check.exercise.judge
        for label, answer in answers.wrongs:
            results = [judge(answer, seed) for seed in range(seeds)]
            passed = [result.seed for result in results if result.status == "right"]
            print(f"  {label} → {f'PASSES with seeds {passed}' if passed else results[0].message}")
        for label, answer in answers.rights:
            for result in (judge(answer, seed) for seed in range(seeds)):
                if result.status != "right":
                    print(f"  REFUSED with seed {result.seed}: {label} → {result.message}")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
