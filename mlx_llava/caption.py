"""Caption folders of pictures and films, in batches, with nothing lost when it is interrupted.

python -m mlx_llava.caption photos --recursive --out captions.jsonl --resume
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mlx_llava.arguments import (
    Parser,
    add_answer_arguments,
    add_frames_argument,
    add_image_tokens_argument,
    add_model_arguments,
    add_ranks_arguments,
    answer_options,
    command,
    load_model,
    say_if_embedded,
)
from mlx_llava.files import is_same_file, one_line, whole_file
from mlx_llava.generation.batch import BatchGenerator
from mlx_llava.generation.jobs import answer_prompts, in_order
from mlx_llava.generation.sampling import BATCH_SIZE, Options
from mlx_llava.inputs.image_paths import find_images
from mlx_llava.inputs.video import ENDINGS, is_film
from mlx_llava.json_files import JsonLines, read_bytes

PROMPT = "Describe the picture."
#: ``--out`` for a text file beside each picture.
BESIDE = "txt"
_FIELD = '"([^"]*(?:""[^"]*)*)"'
_ROW = re.compile(f"{_FIELD},{_FIELD}\n")


class Lines(JsonLines):
    """A file of JSON lines, ``{"image": ..., key: ...}``."""

    def __init__(self, path: Path, key: str = "text") -> None:
        super().__init__(path, '{"image": "', errors="surrogateescape")
        self.key = key

    def done(self) -> set[str]:
        """The images that have a line.

        Raises:
            ValueError: There is something that this command did not write; of all stores.
        """
        is_ours = all(line.startswith(self.head) for line in self.whole().splitlines())
        lines = [line for _, line in self.read()] if is_ours else []
        if not is_ours or any(tuple(line) != ("image", self.key) for line in lines):
            raise ValueError(f"{self.path} holds lines that this command did not write.")
        return {line["image"] for line in lines}

    def write(self, image: str, text: str) -> None:
        """Keeps a caption for good."""
        self.add({"image": image, self.key: text})


class Table:
    """A CSV file with the columns ``image`` and ``text``, and quotes around all that is in it."""

    head = '"image","text"\n'

    def __init__(self, path: Path) -> None:
        self.path = path

    def done(self) -> set[str]:
        """See `Lines`."""
        whole, cut = self._read()
        rows = _ROW.findall(whole)
        begin = '"' if rows else self.head
        is_whole = whole == "".join(f'"{image}","{text}"\n' for image, text in rows)
        is_ours = is_whole and whole.startswith(self.head if rows else "")
        if not is_ours or not (cut.startswith(begin) or begin.startswith(cut)):
            raise ValueError(f"{self.path} holds rows that this command did not write.")
        return {image.replace('""', '"') for image, _ in rows[1:]}

    def mend(self) -> None:
        """Takes away what a kill has left half written."""
        whole, cut = self._read()
        if cut:
            with whole_file(self.path) as beside:
                beside.write_bytes(whole.encode(errors="surrogateescape"))

    def write(self, image: str, text: str) -> None:
        """Keeps a caption for good."""
        is_new = not self.path.exists() or not self.path.stat().st_size
        image, text = (field.replace('"', '""') for field in (image, text))
        rows = f'{self.head if is_new else ""}"{image}","{text}"\n'
        with self.path.open("ab") as file:
            file.write(rows.encode(errors="surrogateescape"))

    def _read(self) -> tuple[str, str]:
        """The whole rows, after which no quotation is open, and what a kill has left of one."""
        data = read_bytes(self.path) if self.path.exists() else b""
        text = data.decode(errors="surrogateescape")
        end = text.rfind("\n") + 1
        while text.count('"', 0, end) % 2:
            end = text.rfind("\n", 0, end - 1) + 1
        return text[:end], text[end:]


class TextFiles:
    """A ``.txt`` beside each picture, which is there whole or not at all."""

    def __init__(self, images: Sequence[str]) -> None:
        self.files = {image: Path(image).with_suffix(".txt") for image in images}
        shared = [path for path, count in Counter(self.files.values()).items() if count > 1]
        if shared:
            raise ValueError(
                f"{len(shared)} text files would be shared by pictures, {shared[0]} first; use "
                "--out captions.jsonl."
            )

    def done(self) -> set[str]:
        """See `Lines`."""
        return {image for image, path in self.files.items() if path.is_file()}

    def mend(self) -> None:
        """Nothing is ever half written."""

    def write(self, image: str, text: str) -> None:
        """Keeps a caption for good.

        Raises:
            ValueError: This one cannot be kept; the others may.
        """
        path = self.files[image]
        if os.path.lexists(path):  # by somebody else, or under another case of letters
            raise ValueError(f"There is {path} already.")
        try:
            with whole_file(path) as beside:
                beside.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}.") from error


Captions: TypeAlias = Lines | Table | TextFiles


def open_captions(out: str, images: Sequence[str]) -> Captions:
    """Where ``--out`` says that captions go.

    Raises:
        ValueError: It is neither a .jsonl nor a .csv file nor ``txt``, or pictures would share
            a text file.
    """
    if out == BESIDE:
        return TextFiles(images)
    path = Path(out)
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"--out is {out}; it must end in .jsonl or .csv, or be {BESIDE}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return Lines(path) if path.suffix == ".jsonl" else Table(path)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_llava.caption",
        description="Caption pictures, or ask all of them the same. A picture that cannot be read "
        "is a line in the errors file, and the rest goes on.",
    )
    add = parser.add_argument
    add("pictures", nargs="+", metavar="PLACE", help='folders, files, or patterns: "photos/*.jpg"')
    add("--recursive", action="store_true", help="look into the folders of folders")
    add("--videos", action="store_true", help="films of folders and patterns too")
    add_frames_argument(parser)
    add("--prompt", "-p", default=PROMPT, help="what to ask (default: %(default)s)")
    add("--system", help="replaces the template's system text")
    add(
        "--out",
        default="captions.jsonl",
        help="a .jsonl or .csv file (default: %(default)s), or "
        f"{BESIDE} for a text file beside each picture",
    )
    add("--resume", action="store_true", help="go on where an earlier run has ended")
    add("--batch-size", type=int, default=BATCH_SIZE, help="answers at once (default: %(default)s)")
    add_image_tokens_argument(parser)
    add_answer_arguments(parser, max_tokens=128)
    add_model_arguments(parser)
    add_ranks_arguments(parser)
    return parser


@command(led=build_parser)
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    from tqdm import tqdm

    args = build_parser().parse_args(argv)
    options = answer_options(args)
    others: set[Path] = set()
    images = find_images(args.pictures, args.recursive, others, ENDINGS if args.videos else ())
    captions = open_captions(args.out, images)
    out = Path("captions" if args.out == BESIDE else args.out)
    errors = Lines(out.with_suffix(".errors.jsonl"), "error")
    files = [errors.path] if args.out == BESIDE else [out, errors.path]
    broken = errors.done()
    done = captions.done() | broken
    begun = [path for path in files if path.exists()]
    if (done or begun) and not args.resume:
        what = str(begun[0]) if begun else f"{len(done)} of {len(images)} text files"
        raise FileExistsError(f"There is {what} already; --resume goes on.")
    captions.mend()
    errors.mend()
    rest = [image for image in images if image not in done]
    before = len({*images} & done - broken)
    count = {"total": len(images), "initial": len(images) - len(rest), "unit": "picture"}
    for image, answer in tqdm(caption_all(rest, args, options), **count, disable=None):
        try:
            if "error" in answer:
                raise ValueError(answer["error"])
            captions.write(image, answer["text"].strip())
        except ValueError as error:
            errors.write(image, one_line(error))
            broken.add(image)
    failed = len(broken & {*images})
    counts = {"written": len(images) - before - failed, "done before": before, "failed": failed}
    ours = [file for file in others if any(is_same_file(file, path) for path in files)]
    ours += [file for file in others if args.out == BESIDE and file.suffix == ".txt"]
    print(_summary(counts, others.difference(ours)), file=sys.stderr)
    if failed:
        raise ValueError(
            f"{failed} of {len(images)} pictures have no caption; {errors.path} says why."
        )


def caption_all(
    images: Sequence[str], args: argparse.Namespace, options: Options
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each picture in order, with its caption as ``text`` or its ``error``."""
    if not images:
        return
    say_if_embedded(args)
    generator = BatchGenerator(*load_model(args), batch_size=args.batch_size)

    def read(image: str) -> dict[str, Any]:
        return {"prompt": args.prompt, "videos" if is_film(image) else "images": [image]}

    asked = {name: getattr(args, name) for name in ("frames", "system", "image_tokens")}
    answers = answer_prompts(images, read, generator, options, **asked)
    yield from zip(images, in_order(answers), strict=True)


def _summary(counts: Mapping[str, int], skipped: Iterable[Path]) -> str:
    """What has become of everything that was found."""
    kinds = Counter(map(_kind, skipped))
    parts = [f"{count} {what}" for what, count in counts.items() if count or what == "written"]
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return ", ".join([*parts, f"{kinds.total()} skipped" + (f" ({listed})" if listed else "")])


def _kind(file: Path) -> str:
    """What a file is that is not captioned, in a word."""
    if not file.exists():
        return "broken link"
    return "closed folder" if file.is_dir() else file.suffix.lower() or "without ending"


if __name__ == "__main__":
    sys.exit(main())
