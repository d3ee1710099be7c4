"""Pretrain nano, the course's small base model, and export it with its tokenizer and model card.

    python -m tools.build_text                               # the text first
    python -m tools.pretrain_nano tokenizer
    python -m tools.pretrain_nano train --minutes 95         # resumes from its last checkpoint with the same command
    python -m tools.pretrain_nano export                     # weights in bf16, tokenizer, configs
    python -m tools.pretrain_nano measure                    # bits per byte, baselines, LoRA, samples
    python -m tools.pretrain_nano card                       # README.md and provenance.json from what was measured

Everything on the way (tokens, checkpoints, log, measurements) is kept in `--work`, by default `build/nano`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.nano.card import card
from tools.nano.measuring import measure
from tools.nano.pretraining import export, train
from tools.nano.text import CONTEXT, HOME, ROOT, UNSEEN, build_tokenizer

NANO = ROOT / "lora_course/data/nano"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build/nano",
        help="checkpoints, log, measurements (default: %(default)s)",
    )
    parser.add_argument(
        "--general",
        type=Path,
        default=ROOT / "build/general.parquet",
        help="the general text (default: %(default)s)",
    )
    parser.add_argument(
        "--general-megabytes",
        type=float,
        default=3.0,
        help="how much of it to train on (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="torch's threads (default: %(default)s)"
    )
    commands = parser.add_subparsers(required=True)
    commands.add_parser("tokenizer", help="train the tokenizer").set_defaults(run=build_tokenizer)
    sub = commands.add_parser("train", help="pretrain, or go on")
    sub.set_defaults(run=train)
    sub.add_argument(
        "--minutes",
        type=float,
        default=95,
        help="minutes of training in all (default: %(default)s)",
    )
    sub.add_argument("--until", help="end at this time instead, HH:MM in UTC")
    sub.add_argument(
        "--decay-fraction",
        type=float,
        default=0.3,
        help="share of the time in which the learning rate falls (default: %(default)s)",
    )
    sub.add_argument(
        "--warmup", type=int, default=60, help="steps of warm-up (default: %(default)s)"
    )
    sub.add_argument(
        "--batch",
        type=int,
        default=16,
        help=f"windows of {CONTEXT} tokens a step (default: %(default)s)",
    )
    sub.add_argument(
        "--muon-lr",
        type=float,
        default=0.02,
        help="learning rate of the matrices (default: %(default)s)",
    )
    sub.add_argument(
        "--lr",
        type=float,
        default=3e-3,
        help="learning rate of embeddings, norms and biases (default: %(default)s)",
    )
    sub.add_argument(
        "--weight-decay",
        type=float,
        default=0.1,
        help="decay of the matrices (default: %(default)s)",
    )
    sub.add_argument(
        "--save-minutes",
        type=float,
        default=3,
        help="minutes between checkpoints (default: %(default)s)",
    )
    for name, command, words in (
        ("export", export, "write the model as from_pretrained reads it"),
        ("measure", measure, "measure the exported model"),
        ("card", card, "write model card and provenance"),
    ):
        sub = commands.add_parser(name, help=words)
        sub.set_defaults(run=command)
        sub.add_argument(
            "--out",
            type=Path,
            default=NANO,
            help="folder of the exported model (default: %(default)s)",
        )
        if name == "measure":
            sub.add_argument(
                "--domains",
                nargs="+",
                default=[HOME, *UNSEEN],
                help="domains to measure (default: all)",
            )
            sub.add_argument(
                "--lora-lrs",
                nargs="+",
                type=float,
                default=[4e-3, 8e-3, 1.6e-2],
                help="learning rates to choose from (default: %(default)s)",
            )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.run(args)


if __name__ == "__main__":
    main()
