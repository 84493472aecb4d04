"""Caption folders of pictures and films, in batches, with nothing lost when it is interrupted.

python -m mlx_llava.caption photos --recursive --out captions.jsonl --resume
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_llava.arguments import (
    Parser,
    add_answer_arguments,
    add_frames_argument,
    add_image_tokens_argument,
    add_model_arguments,
    add_share_arguments,
    answer_options,
    command,
    load_model,
    say_if_embedded,
)
from mlx_llava.captioning.questions import PROMPT, Questions, read_questions, with_columns_alone
from mlx_llava.captioning.rename import Renames, plan
from mlx_llava.captioning.run import BESIDE, Existing, Run, renames_path
from mlx_llava.captioning.watch import whole_pictures
from mlx_llava.checkpoint.hub import lasting_part
from mlx_llava.files import expand_home, only_writer
from mlx_llava.generation.batch import BatchGenerator
from mlx_llava.generation.jobs import answer_prompts, in_order
from mlx_llava.generation.sampling import BATCH_SIZE, Options
from mlx_llava.inputs.image_paths import find_images
from mlx_llava.inputs.video import ENDINGS, is_film

#: Flags that say what is captioned and where to, and not how.
_NOT_ASKED = (
    "pictures recursive videos out xmp resume skip_existing overwrite watch rename dry_run undo "
    "batch_size offline rank_timeout"
).split()


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_llava.caption",
        description="Caption pictures, or ask all of them the same. A picture that cannot be read "
        "is a line in the errors file, and the rest goes on.",
    )
    add = parser.add_argument
    add("pictures", nargs="*", metavar="PLACE", help='folders, files, or patterns: "photos/*.jpg"')
    add("--recursive", action="store_true", help="look into the folders of folders")
    add("--videos", action="store_true", help="films of folders and patterns too")
    add_frames_argument(parser)
    add(
        "--prompt",
        "-p",
        action="append",
        metavar="[NAME=]PROMPT",
        help="what to ask; several times for several columns, which NAME names "
        f"(default: {PROMPT})",
    )
    add("--system", help="replaces the template's system text")
    add("--prefix", default="", metavar="TEXT", help="goes before each caption")
    add("--suffix", default="", metavar="TEXT", help="goes after each caption")
    _add_file_arguments(parser)
    add("--batch-size", type=int, default=BATCH_SIZE, help="answers at once (default: %(default)s)")
    add_image_tokens_argument(parser)
    add_answer_arguments(parser, max_tokens=128)
    add_model_arguments(parser)
    add_share_arguments(parser)
    return parser


def _add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds where captions go, and what becomes of what is there."""
    add = parser.add_argument
    add(
        "--out",
        default="captions.jsonl",
        help="a .jsonl or .csv file (default: %(default)s), or "
        f"{BESIDE} for a text file beside each picture",
    )
    add("--xmp", action="store_true", help="also as dc:description into each picture's sidecar")
    add("--resume", action="store_true", help="go on where an earlier run has ended")
    add("--skip-existing", action="store_true", help="pass over what has a caption, whose ever")
    add("--overwrite", action="store_true", help="replace captions that are there, of anybody")
    add("--watch", action="store_true", help="go on with new pictures of folders, until Control-C")
    add("--rename", action="store_true", help="name files by their pictures' captions")
    add("--dry-run", action="store_true", help="only show what --rename would do")
    add("--undo", metavar="FILE", help="give files their names again, by a .renamed.jsonl file")


@command(led=build_parser)
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    if args.undo:
        with only_writer(Path(args.undo)):
            _undo(Renames(Path(args.undo)))
        return
    _check_flags(args)
    with only_writer(renames_path(args.out), args.out):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    """Captions what there is to caption."""
    options = answer_options(args)
    options = replace(options, json_schema=with_columns_alone(options.json_schema))
    questions = read_questions(args.prompt or [], options.json_schema, args.prefix, args.suffix)
    existing = Existing(args.resume or args.watch, args.skip_existing, args.overwrite)
    run = Run(args.out, questions.columns, _asked(args, questions, options), existing, args.xmp)
    if not args.dry_run:
        run.renames.finish()
    others: set[Path] = set()
    images = [] if args.watch else _find(args, args.pictures, others)
    rest = run.todo(images)
    captioner = Captioner(args, questions, options)
    try:
        if args.watch:
            _watch(args, run, captioner, others)
        else:
            captioner.caption(rest, run, len(images))
    except KeyboardInterrupt:
        if not args.watch:
            print(f"\n{run.summary(others)}; --resume goes on", file=sys.stderr)
            raise
    print(run.summary(others), file=sys.stderr)
    if args.rename:
        _rename(run, args.dry_run)
    run.check()


def _check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError for flags that make no sense together."""
    if not args.pictures:
        raise ValueError("Name folders, files or patterns to caption.")
    if args.dry_run and not args.rename:
        raise ValueError("--dry-run shows what --rename would do; add it.")
    if args.skip_existing and args.overwrite:
        raise ValueError("--skip-existing leaves what --overwrite replaces; choose one of them.")
    if args.watch and (args.rename or args.overwrite):
        raise ValueError("--watch goes with neither --rename nor --overwrite; run them afterwards.")
    files = [place for place in args.pictures if args.watch and not expand_home(place).is_dir()]
    if files:
        raise ValueError(f"--watch looks into folders, and {files[0]} is none.")


def _asked(args: argparse.Namespace, questions: Questions, options: Options) -> dict[str, Any]:
    """How captions are asked for: by whom, with what words, and how answers are chosen."""
    asked = {name: value for name, value in vars(args).items() if name not in _NOT_ASKED}
    for name in ("model", "adapter_path", "base", "vision_tower", "mmproj"):
        asked[name] = asked[name] and lasting_part(asked[name])
    return {**asked, "prompt": dict(questions.prompts), "json_schema": options.json_schema}


def _find(args: argparse.Namespace, places: Sequence[str], others: set[Path]) -> list[str]:
    return find_images(places, args.recursive, others, ENDINGS if args.videos else ())


class Captioner:
    """Asks a model, which is loaded for the first picture, about pictures."""

    def __init__(self, args: argparse.Namespace, questions: Questions, options: Options) -> None:
        self.args, self.questions, self.options = args, questions, options

    @cached_property
    def _generator(self) -> BatchGenerator:
        say_if_embedded(self.args)
        return BatchGenerator(*load_model(self.args), batch_size=self.args.batch_size)

    def caption(self, images: Sequence[str], run: Run, total: int) -> None:
        """Captions pictures, the last of so many in all, and keeps what comes of each."""
        from tqdm import tqdm

        count = {"total": total, "initial": total - len(images), "unit": "picture"}
        for image, answers in tqdm(self._answers(images), **count, disable=None):
            try:
                values = self.questions.values(answers)
            except ValueError as error:
                run.fail(image, error)
            else:
                run.keep(image, values)

    def _answers(self, images: Sequence[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """Each picture in order, with what is answered to each prompt."""
        prompts = self.questions.prompts.values()
        asked = [(image, prompt) for image in images for prompt in prompts]
        if not asked:
            return

        def read(pair: tuple[str, str]) -> dict[str, Any]:
            image, prompt = pair
            return {"prompt": prompt, "videos" if is_film(image) else "images": [image]}

        how = {name: getattr(self.args, name) for name in ("frames", "system", "image_tokens")}
        answers = in_order(answer_prompts(asked, read, self._generator, self.options, **how))
        for image in images:
            yield image, list(islice(answers, len(prompts)))


def _watch(args: argparse.Namespace, run: Run, captioner: Captioner, others: set[Path]) -> None:
    """Captions what is in folders and what comes, until Control-C."""

    def find() -> Iterable[str]:
        others.clear()
        for place in args.pictures:
            with suppress(ValueError, OSError):  # empty so far, or gone for a while
                yield from _find(args, [place], others)

    print("Waiting for pictures; Control-C ends it.", file=sys.stderr)
    for images in whole_pictures(find, run.is_done):
        if images:
            captioner.caption(images, run, len(images))


def _rename(run: Run, is_dry: bool) -> None:
    """Names pictures by their captions, or shows how."""
    renamed, failed = 0, list[str]()
    for move in plan(run.titles(), run.own_files()):
        try:
            if not is_dry:
                run.renames.apply(move)
            renamed += len(move.rests)
        except OSError as error:
            failed.append(f"{move.old} keeps its name: {error.strerror or error}")
        if is_dry:
            for old, new in move.paths():
                print(f"{_printable(old)} -> {_printable(new.name)}")
    if renamed and not is_dry:
        run.renames.close()
    would = "would be renamed" if is_dry else f"renamed; --undo {run.renames.path} takes it back"
    print(f"{renamed} files {would}" if renamed else "Nothing to rename.", file=sys.stderr)
    if failed:
        raise ValueError(f"{len(failed)} pictures keep their names; {failed[0]}.")


def _undo(renames: Renames) -> None:
    """Gives files their old names."""
    if not renames.path.is_file():
        raise FileNotFoundError(f"There is no undo file {renames.path}.")
    restored, failed = renames.undo()
    print(f"{restored} files have their old names again", file=sys.stderr)
    if failed:
        raise ValueError(f"{len(failed)} have not; {failed[0]}.")


def _printable(name: str | Path) -> str:
    return os.fsencode(name).decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
