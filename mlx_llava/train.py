"""Trains a LLaVA: LLaVA's stage 1 (the projector), stage 2 (all of it), or LoRA.

python -m mlx_llava.train --stage lora --data train.json --image-folder images --output tuned
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_llava.arguments import (
    Parser,
    add_frames_argument,
    add_loading_arguments,
    add_options,
    add_ranks_arguments,
    command,
    given_options,
    load_model,
    named,
)
from mlx_llava.checkpoint.hub import EMBEDDED, embedded_model, lasting_part
from mlx_llava.checkpoint.save import save
from mlx_llava.files import whole_file
from mlx_llava.folders import Kind, check_target, new_folder
from mlx_llava.inputs.processor import Processor
from mlx_llava.json_files import JsonLines
from mlx_llava.model.device import fast_dtype
from mlx_llava.model.ranks import met
from mlx_llava.tuner.data import Examples
from mlx_llava.tuner.lora import TARGETS, Adapter, save_adapter
from mlx_llava.tuner.recipe import TrainingOptions, prepare
from mlx_llava.tuner.samples import MISSING, LeftOut, Skipped, TrainingFile, read_samples, summary
from mlx_llava.tuner.trainer import Report, Trainer

#: The part of the samples that may be without their files.
_MOST_MISSING = 0.1
#: How a report's line begins, and what every one of training says; those of validation are short.
_BEGINNING = '{"step": '
_REPORTED = {"step", "loss", "gradient_norm", "tokens"}


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_llava.train",
        description="Train a LLaVA on conversations about pictures and videos, in LLaVA's own "
        "JSON. With mlx.launch, several processes share the batches.",
    )
    add = parser.add_argument
    add("--model", help="what to start from (default: the embedded model)")
    add("--data", required=True, metavar="FILE", help="LLaVA's training JSON, or JSON lines")
    add("--valid", metavar="FILE", help="the same, to measure and not to learn")
    paths = "what paths of pictures and videos are relative to (default: .)"
    add("--image-folder", default=".", help=paths)
    add("--allow-missing", action="store_true", help="train also where many files are missing")
    add_frames_argument(parser)
    add(
        "--output", type=named, default="trained", help="the folder to write (default: %(default)s)"
    )
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add_options(parser, fields(TrainingOptions))
    for name in ("rank", "alpha", "dropout"):
        default = getattr(Adapter, name)
        add(f"--lora-{name}", type=type(default), default=default, help="(default: %(default)s)")
    add("--lora-targets", nargs="+", default=TARGETS, metavar="LAYER", help="(default: all)")
    add_loading_arguments(parser)
    add_ranks_arguments(parser)
    return parser


def _write_result(
    target: Path,
    trainer: Trainer,
    processor: Processor,
    adapter: Adapter,
    keep: Sequence[str | None],
) -> None:
    """Writes what was trained: a whole model, or what is to be put on its base."""
    if trainer.options.stage == "full":
        save(trainer.model, processor, target, force=True, keep=keep)
        return
    with new_folder(target, "adapter", force=True, keep=keep) as beside:
        save_adapter(beside, adapter, dict(tree_flatten(trainer.trained)))


def read_reports(path: Path) -> list[Report]:
    """What a run has reported; a last line that a kill has cut is left out.

    Raises:
        ValueError: The file holds something else.
    """
    records = JsonLines(path, _BEGINNING).read()
    for place, record in records:
        is_dict = isinstance(record, dict)
        if not is_dict or ({*record} != {"step", "valid_loss"} and not {*record} >= _REPORTED):
            raise ValueError(f"{place} is no line that mlx_llava.train wrote.")
    return [record for _, record in records]


class Progress:
    """metrics.jsonl and a bar."""

    def __init__(self, path: Path, step: int, steps: int) -> None:
        """Goes on after `step`; what an interrupted run wrote beyond it is dropped."""
        from tqdm import tqdm

        self.reports = [report for report in read_reports(path) if report["step"] <= step]
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as beside:
            beside.write_text("".join(json.dumps(r) + "\n" for r in self.reports), "utf-8")
        self.file = JsonLines(path, _BEGINNING)
        self.bar = tqdm(total=steps, initial=step, unit="step", desc="training", disable=None)

    def __call__(self, report: Report) -> None:
        """Keeps and shows what was measured."""
        self.reports.append(report)
        self.file.add(report)
        self.bar.update(int(report["step"]) - self.bar.n)
        if "valid_loss" in report:
            self.bar.write(
                f"step {report['step']}: validation loss {report['valid_loss']:.4f}", sys.stderr
            )
        else:
            self.bar.set_postfix_str(
                f"loss {report['loss']:.4f}, {report['tokens_per_second']:.0f} tokens/s, "
                f"{report['peak_memory']:.1f} GB"
            )

    def close(self) -> None:
        """Ends the bar and draws the losses, where matplotlib is installed."""
        self.bar.close()
        if not self.reports:
            return
        try:
            from mlx_llava.analysis.plots import plot_losses
        except ImportError:
            print("no loss.png: pip install 'mlx_llava[plot]'", file=sys.stderr)
        else:
            with whole_file(self.file.path.with_name("loss.png")) as beside:
                plot_losses(self.reports).savefig(beside, format="png", dpi=120)


def _say(path: str, left_out: Counter[str], unread: Mapping[str, int]) -> None:
    """Says on stderr what is not learned of a file."""
    left = f"{left_out.total()} samples were left out, see skipped.jsonl"
    keys = "keys that are not read, with the number of samples"
    for what, counts in ((left, left_out), (keys, unread)):
        if counts:
            print(f"{path}: {what}: {summary(counts)}", file=sys.stderr)


def _check_folder(target: Path, kind: Kind, resume: bool, keep: Sequence[str | None]) -> None:
    """Raises an error unless all that a run writes is new, or of the run that it goes on with."""
    folder, metrics = target.parent, target.with_name("metrics.jsonl")
    if resume and metrics.exists():
        read_reports(metrics)
        check_target(target, kind, True, keep)
        return
    if metrics.exists():
        raise FileExistsError(f"{folder} holds a run already; --resume goes on with it.")
    names = ["loss.png", "skipped.jsonl", *([] if resume else ["checkpoints"])]
    for path in (target, *(folder / name for name in names)):
        if os.path.lexists(path):
            raise FileExistsError(
                f"{path} exists already, of no run of this command; choose another --output."
            )


def _check_missing(path: str, reading: TrainingFile, image_folder: str) -> None:
    """Raises ValueError where so much is missing that the folder is probably another."""
    missing = sum(count for reason, count in reading.problems.items() if reason in MISSING)
    total = len(reading.samples) + len(reading.left_out)
    if missing > total * _MOST_MISSING:
        raise ValueError(
            f"{path} names files that are not in --image-folder {image_folder} in {missing} of "
            f"{total} samples; correct the folder, or train without them by --allow-missing."
        )


def _origin(args: argparse.Namespace, adapter: Adapter, dtype: str) -> dict[str, Any]:
    """What a run begins with, by flag."""
    parts = {name: lasting_part(getattr(args, name)) for name in ("base", "vision_tower", "mmproj")}
    model = lasting_part(args.model or embedded_model())
    found = {"model": model, **parts, "revision": args.revision, "dtype": dtype}
    if adapter.stage == "lora":
        numbers = {f"lora_{key}": getattr(adapter, key) for key in ("rank", "alpha", "dropout")}
        found |= {**numbers, "lora_targets": sorted(adapter.targets)}
    return found


@contextmanager
def _stopped_by_control_c() -> Iterator[Callable[[], bool]]:
    """Gives whether Control-C was pressed; pressed again, it ends everything."""
    pressed: list[int] = []

    def press(number: int, _: Any) -> None:
        print("\nstopping after this step; Control-C again stops at once", file=sys.stderr)
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _read_data(
    args: argparse.Namespace, processor: Processor, speaks: bool
) -> tuple[dict[str, Examples], list[LeftOut]]:
    """What is learned and what is measured, by option, and what cannot be."""
    data: dict[str, Examples] = {}
    left_out: list[LeftOut] = []
    for name in ("data", "valid"):
        path = getattr(args, name)
        if path:
            reading = read_samples(path, args.image_folder, processor.tokenizer.protect)
            if not args.allow_missing:
                _check_missing(path, reading, args.image_folder)
            data[name] = Examples(reading.samples, processor, args.max_length, args.frames)
            left_out += reading.left_out
            if speaks:
                _say(path, reading.problems, reading.unread)
    return data, left_out


@command(is_shared=True)
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    options = TrainingOptions(**given_options(args, fields(TrainingOptions)))
    lora = (args.lora_rank, args.lora_alpha, args.lora_dropout, tuple(args.lora_targets))
    adapter = Adapter(args.model or EMBEDDED, options.stage, *lora)
    folder = Path(args.output)
    rank = met().rank
    is_main = rank == 0
    kind: Kind = "model" if options.stage == "full" else "adapter"
    keep = [str(args.model or embedded_model()), args.base, args.vision_tower, args.mmproj]
    if is_main:
        _check_folder(folder / kind, kind, args.resume, keep)
    template = args.template or ("plain" if args.stage == "projector" else None)
    dtype = args.dtype or fast_dtype()
    model, processor = load_model(args, dtype=dtype, template=template)
    mx.random.seed(options.seed)
    prepare(model, options, adapter)
    data, left_out = _read_data(args, processor, speaks=is_main)
    origin = _origin(args, adapter, dtype)
    trainer = Trainer(model, data["data"], data.get("valid"), options, folder, origin)
    if args.resume:
        trainer.resume()
    skipped = Skipped(folder / ("skipped.jsonl" if is_main else f"skipped-{rank}.jsonl"))
    for examples in data.values():
        examples.on_left_out = skipped
    if not is_main:  # its samples are others than those of the first process
        trainer.run(lambda _report: None)
        return
    progress = Progress(folder / "metrics.jsonl", trainer.step, trainer.steps)
    for left in left_out:
        skipped(left)
    try:
        with _stopped_by_control_c() as is_stopped:
            trainer.run(progress, is_stopped)
    finally:
        progress.close()
    if trainer.step < trainer.steps:
        said = f"stopped after step {trainer.step} of {trainer.steps}, which is saved in {folder}"
        print(f"{said}; the same command with --resume goes on", file=sys.stderr)
        raise KeyboardInterrupt
    for name, examples in data.items():
        _say(getattr(args, name), examples.problems, {})
    _write_result(folder / kind, trainer, processor, adapter, keep)
    print(folder / kind)


if __name__ == "__main__":
    sys.exit(main())
