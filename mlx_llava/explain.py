"""Draw what a model looked at while it answered, what it thought, and what it depends on.

    python -m mlx_llava.explain --image photo.jpg --prompt "What is this?" --out report.html

`explain` gives the same as arrays, `mlx_llava.analysis.plots` as figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_llava.analysis.attribution import (
    Explanation,
    MaskEffect,
    explain,
    logit_lens,
    mask_effect,
    nearest_words,
)
from mlx_llava.analysis.report import COMMAND, check_report, sections, write_report
from mlx_llava.analysis.trace import Trace, trace
from mlx_llava.arguments import (
    Parser,
    add_model_arguments,
    add_video_arguments,
    command,
    load_model,
)
from mlx_llava.bars import progress_bar
from mlx_llava.checkpoint.hub import embedded_note
from mlx_llava.files import check_output

__all__ = [
    "Explanation",
    "MaskEffect",
    "Trace",
    "explain",
    "logit_lens",
    "mask_effect",
    "nearest_words",
    "trace",
]


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_llava.explain",
        description="Answer a question about pictures and videos, and draw what the answer came "
        "from: attention, rollout, masking, and what each layer would have said.",
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--image", action="append", default=[], metavar="FILE", help="a path or URL; repeatable")
    add_video_arguments(parser)
    add("--prompt", "-p", required=True, help="what to ask")
    add("--system", help="replaces the template's system text")
    add("--max-tokens", "-m", type=int, default=32, help="of the answer (default: %(default)s)")
    add("--window", type=int, metavar="PATCHES", help="side of what is masked together")
    add("--out", type=Path, required=True, metavar="FILE", help="report.png or report.html")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    check_report(args.out)
    check_output(args.out, COMMAND, [*args.image, *args.video])
    model, processor = load_model(args)
    found = explain(
        model,
        processor,
        args.prompt,
        args.image,
        video=args.video,
        frames=args.frames,
        max_tokens=args.max_tokens,
        system=args.system,
    )
    with progress_bar("masking", unit="part") as progress:
        shown = sections(model, processor, found, window=args.window, progress=progress)
    question = args.prompt if args.model else f"{args.prompt} ({embedded_note()})"
    write_report(shown, question, found.answer, args.out)
    print(found.answer)


if __name__ == "__main__":
    sys.exit(main())
