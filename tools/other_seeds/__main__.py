"""Trains studies with five other seeds, and has chapters judge their claims on them.

    python -m tools.other_seeds run STUDY ...      e.g. 1_2_adalora: into records/, resumable
    python -m tools.other_seeds judge STEM ...     executes chapters on those records; into verdicts.json

Rates and everything else that was chosen stay as they are in the course's record; only the scored runs are trained anew.
"""

import argparse

from tools.chapters import chapters
from tools.other_seeds.judge import judge, keep
from tools.other_seeds.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("run").add_argument("names", nargs="+", metavar="STUDY")
    stems = [path.stem for path in chapters()]
    actions.add_parser("judge").add_argument("names", nargs="+", metavar="STEM", choices=stems)
    asked = parser.parse_args()
    for name in asked.names:
        if asked.action == "run":
            print(train(name))
        else:
            keep(name, found := judge(name))
            print(
                f"{name}: {sum(c['holds'] == c['held'] for c in found.values())} of {len(found)} verdicts stay"
            )


if __name__ == "__main__":
    main()
