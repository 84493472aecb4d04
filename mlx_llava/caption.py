"""Caption folders of pictures, in batches, with nothing lost when it is interrupted.

python -m mlx_llava.caption photos --recursive --out captions.jsonl --resume
"""

from __future__ import annotations

import argparse
import csv
import glob
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from mlx_llava.batch import BATCH_SIZE, BatchGenerator
from mlx_llava.command import command
from mlx_llava.decoding import Options
from mlx_llava.files import whole_file
from mlx_llava.image import FORMATS
from mlx_llava.json_files import parse
from mlx_llava.loading import add_model_arguments, load_model, say_if_embedded
from mlx_llava.prompts_file import answer_prompts

PROMPT = "Describe the picture."
#: ``--out`` for a text file beside each picture.
BESIDE = "txt"


def find_pictures(places: Sequence[str], recursive: bool = False) -> list[str]:
    """The pictures of folders and patterns, each once, those of a place in order of their names.

    Args:
        places (list of str): Folders, files, and patterns as ``photos/*.jpg``, in which ``**``
            stands for any folders.
        recursive (bool): Looks into the folders of folders.

    Raises:
        ValueError: A place has no picture.
    """
    found: dict[str, None] = {}
    for place in places:
        path = Path(place).expanduser()
        if path.is_file():
            pictures = [str(path)]
        else:
            names = "**/*" if recursive else "*"
            pattern = f"{glob.escape(str(path))}/{names}" if path.is_dir() else str(path)
            files = glob.iglob(pattern, recursive=True)  # noqa: PTH207 - Path's has no absolute ones
            pictures = sorted(str(Path(file)) for file in files if _is_picture(Path(file)))
        if not pictures:
            hint = "; --recursive looks into its folders" if path.is_dir() and not recursive else ""
            raise ValueError(f"There is no picture in {place}{hint}.")
        found.update(dict.fromkeys(pictures))
    return list(found)


@cache
def _endings() -> set[str]:
    """What the names of pictures end in."""
    known = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS}
    return known | {".heic", ".heif"}


def _is_picture(file: Path) -> bool:
    """Whether a file's name is that of a picture; macOS writes ``._`` files beside real ones."""
    is_hidden = file.name.startswith(".")
    return file.suffix.lower() in _endings() and not is_hidden and file.is_file()


class Captions(Protocol):
    """Where captions are kept."""

    def done(self) -> set[str]:
        """The pictures that have one."""
        ...

    def mend(self) -> None:
        """Takes away what a kill has left half written."""
        ...

    def write(self, picture: str, text: str) -> None:
        """Keeps a caption for good."""
        ...


class _Records:
    """A file of records, each of whole lines, the last of which a kill may have cut."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def is_whole(self, _record: str) -> bool:
        """Whether some whole lines are a record, and not the beginning of one."""
        return True

    def records(self) -> list[str]:
        """The whole records."""
        if not self.path.exists():
            return []
        text = self.path.read_bytes().decode("utf-8", errors="surrogateescape")
        records, record = [], ""
        for line in text.split("\n")[:-1]:
            record += line + "\n"
            if self.is_whole(record):
                records.append(record)
                record = ""
        return records

    def mend(self) -> None:
        """See `Captions`."""
        content = "".join(self.records()).encode("utf-8", errors="surrogateescape")
        if self.path.exists() and self.path.stat().st_size != len(content):
            with whole_file(self.path) as beside:
                beside.write_bytes(content)

    def append(self, text: str) -> None:
        """Adds a record."""
        with self.path.open("a", encoding="utf-8", errors="surrogateescape", newline="") as file:
            file.write(text)


class Lines(_Records):
    """A file of JSON lines, ``{"image": ..., key: ...}``."""

    def __init__(self, path: Path, key: str = "text") -> None:
        super().__init__(path)
        self.key = key

    def done(self) -> set[str]:
        """See `Captions`."""
        try:
            return {parse(line, str(self.path))["image"] for line in self.records()}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.path} holds lines that this command did not write.") from error

    def write(self, picture: str, text: str) -> None:
        """See `Captions`."""
        line = json.dumps({"image": picture, self.key: text}, ensure_ascii=False)
        self.append(line + "\n")


class Table(_Records):
    """A CSV file with the columns ``image`` and ``text``."""

    columns = ("image", "text")

    def is_whole(self, record: str) -> bool:
        """Whether no quotation is open."""
        return record.count('"') % 2 == 0

    def done(self) -> set[str]:
        """See `Captions`."""
        rows = list(csv.reader(io.StringIO("".join(self.records()), newline="")))
        head = tuple(rows[0]) if rows else self.columns
        if head != self.columns or any(len(row) != 2 for row in rows):
            raise ValueError(f"{self.path} holds rows that this command did not write.")
        return {row[0] for row in rows[1:]}

    def write(self, picture: str, text: str) -> None:
        """See `Captions`."""
        buffer = io.StringIO()
        is_new = not self.path.exists() or not self.path.stat().st_size
        rows = [self.columns, (picture, text)] if is_new else [(picture, text)]
        csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(rows)
        self.append(buffer.getvalue())


class TextFiles:
    """A ``.txt`` beside each picture."""

    def __init__(self, pictures: Sequence[str]) -> None:
        self.pictures = pictures

    def done(self) -> set[str]:
        """See `Captions`."""
        return {picture for picture in self.pictures if _text_file(picture).exists()}

    def mend(self) -> None:
        """See `Captions`; a text file is there whole or not at all."""

    def write(self, picture: str, text: str) -> None:
        """See `Captions`."""
        with whole_file(_text_file(picture)) as beside:
            beside.write_text(text + "\n", encoding="utf-8")


def _text_file(picture: str) -> Path:
    return Path(picture).with_suffix(".txt")


def open_captions(out: str, pictures: Sequence[str]) -> Captions:
    """Where ``--out`` says that captions go.

    Raises:
        ValueError: It is neither a .jsonl nor a .csv file nor ``txt``, or pictures would share
            a text file.
    """
    if out == BESIDE:
        shared = [path for path, count in Counter(map(_text_file, pictures)).items() if count > 1]
        if shared:
            raise ValueError(
                f"{len(shared)} text files would be shared by pictures, {shared[0]} first; use "
                "--out captions.jsonl."
            )
        return TextFiles(pictures)
    kinds: dict[str, type[Lines | Table]] = {".jsonl": Lines, ".csv": Table}
    path = Path(out)
    if path.suffix not in kinds:
        raise ValueError(f"--out is {out}; it must end in .jsonl or .csv, or be {BESIDE}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return kinds[path.suffix](path)


def in_order(lines: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What `answer_prompts` yields, by index: each waits for those before it."""
    waiting: dict[int, dict[str, Any]] = {}
    following = 0
    for line in lines:
        waiting[line["index"]] = line
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="mlx_llava.caption",
        description="Caption pictures, or ask all of them the same. A picture that cannot be read "
        "is a line in the errors file, and the rest goes on.",
    )
    add = parser.add_argument
    add("pictures", nargs="+", metavar="PLACE", help='folders, files, or patterns: "photos/*.jpg"')
    add("--recursive", action="store_true", help="look into the folders of folders")
    add("--prompt", "-p", default=PROMPT, help="what to ask (default: %(default)s)")
    add("--system", help="replaces the template's system text")
    add(
        "--out",
        default="captions.jsonl",
        help="a .jsonl or .csv file (default: %(default)s), or "
        f"{BESIDE} for a text file beside each picture",
    )
    add("--resume", action="store_true", help="go on where an earlier run has ended")
    add("--max-tokens", "-m", type=int, default=128, help="of a caption (default: %(default)s)")
    add(
        "--batch-size", type=int, default=BATCH_SIZE, help="pictures at once (default: %(default)s)"
    )
    add_model_arguments(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    pictures = find_pictures(args.pictures, args.recursive)
    captions = open_captions(args.out, pictures)
    errors = Lines(
        Path("captions" if args.out == BESIDE else args.out).with_suffix(".errors.jsonl"), "error"
    )
    broken = errors.done()
    done = captions.done() | broken
    begun = [str(path) for path in (Path(args.out), errors.path) if path.exists()]
    if (done or begun) and not args.resume:
        what = begun[0] if begun else f"{len(done)} of {len(pictures)} text files"
        raise FileExistsError(f"There is {what} already; --resume goes on.")
    captions.mend()
    errors.mend()
    from tqdm import tqdm

    rest = [picture for picture in pictures if picture not in done]
    bar = tqdm(total=len(pictures), initial=len(pictures) - len(rest), unit="picture", disable=None)
    with bar:
        for picture, line in caption_all(rest, args):
            if "error" in line:
                errors.write(picture, line["error"])
                broken.add(picture)
            else:
                captions.write(picture, line["text"].strip())
            bar.update()
    failed = broken & {*pictures}
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(pictures)} pictures have no caption; {errors.path} says why."
        )


def caption_all(
    pictures: Sequence[str], args: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each picture in order, with its caption as ``text`` or its ``error``."""
    if not pictures:
        return
    say_if_embedded(args)
    model, processor = load_model(args)
    generator = BatchGenerator(model, processor, batch_size=args.batch_size)
    options = Options(max_tokens=args.max_tokens)

    def ask(picture: str) -> dict[str, Any]:
        return {"prompt": args.prompt, "images": [picture]}

    answers = answer_prompts(pictures, ask, generator, processor, options, system=args.system)
    for answer in in_order(answers):
        yield pictures[answer["index"]], answer


if __name__ == "__main__":
    sys.exit(main())
