"""Caption folders of pictures, in batches, with nothing lost when it is interrupted.

python -m mlx_llava.caption photos --recursive --out captions.jsonl --resume
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlx_llava.arguments import add_model_arguments, command, load_model, say_if_embedded
from mlx_llava.files import is_same_file, one_line, read_bytes, whole_file
from mlx_llava.generation.batch import BATCH_SIZE, BatchGenerator
from mlx_llava.generation.jobs import answer_prompts, in_order
from mlx_llava.generation.sampling import Options
from mlx_llava.inputs.image_paths import find_images
from mlx_llava.json_files import JsonLines

PROMPT = "Describe the picture."
#: ``--out`` for a text file beside each picture.
BESIDE = "txt"


class Captions(Protocol):
    """Where captions are kept."""

    def holds(self, file: Path) -> bool:
        """Whether a file that is no picture may be one of these."""
        ...

    def done(self) -> set[str]:
        """The pictures that have one."""
        ...

    def mend(self) -> None:
        """Takes away what a kill has left half written.

        Raises:
            ValueError: There is something that this command did not write.
        """
        ...

    def write(self, picture: str, text: str) -> None:
        """Keeps a caption for good.

        Raises:
            NotWrittenError: This caption alone cannot be kept.
        """
        ...


class NotWrittenError(Exception):
    """One caption cannot be kept; the others may."""


def _not_ours(path: Path, unit: str) -> ValueError:
    return ValueError(f"{path} holds {unit} that this command did not write.")


class Lines(JsonLines):
    """A file of JSON lines, ``{"image": ..., key: ...}``."""

    def __init__(self, path: Path, key: str = "text") -> None:
        super().__init__(path, '{"image": "', errors="surrogateescape")
        self.key = key

    def holds(self, file: Path) -> bool:
        return is_same_file(file, self.path)

    def done(self) -> set[str]:
        try:
            lines = [line for _, line in self.read()]
        except ValueError as error:
            raise _not_ours(self.path, "lines") from error
        if not all(isinstance(line, dict) and tuple(line) == ("image", self.key) for line in lines):
            raise _not_ours(self.path, "lines")
        return {line["image"] for line in lines}

    def mend(self) -> None:
        if not all(line.startswith(self.head) for line in self.whole().splitlines()):
            raise _not_ours(self.path, "lines")
        super().mend()

    def write(self, picture: str, text: str) -> None:
        self.add({"image": picture, self.key: text})


class Table:
    """A CSV file with the columns ``image`` and ``text``."""

    columns = ("image", "text")

    def __init__(self, path: Path) -> None:
        self.path = path

    def holds(self, file: Path) -> bool:
        return is_same_file(file, self.path)

    def done(self) -> set[str]:
        records, _ = self._records()
        rows = list(csv.reader(io.StringIO("".join(records), newline="")))
        head = tuple(rows[0]) if rows else self.columns
        if head != self.columns or any(len(row) != 2 for row in rows):
            raise _not_ours(self.path, "rows")
        return {row[0] for row in rows[1:]}

    def mend(self) -> None:
        records, cut = self._records()
        begins = [_rows(self.columns), *['"'] * len(records)]
        begin = begins[len(records)]
        is_ours = all(map(str.startswith, records, begins))
        if not is_ours or not (cut.startswith(begin) or begin.startswith(cut)):
            raise _not_ours(self.path, "rows")
        if cut:
            with whole_file(self.path) as beside:
                beside.write_bytes("".join(records).encode(errors="surrogateescape"))

    def write(self, picture: str, text: str) -> None:
        is_new = not self.path.exists() or not self.path.stat().st_size
        head = [self.columns] if is_new else []
        rows = _rows(*head, (picture, text))
        with self.path.open("ab") as file:
            file.write(rows.encode(errors="surrogateescape"))

    def _records(self) -> tuple[list[str], str]:
        """The whole rows, in which no quotation is open, and what a kill has left of one."""
        data = read_bytes(self.path) if self.path.exists() else b""
        records, record = list[str](), ""
        for line in re.split(r"(?<=\n)", data.decode(errors="surrogateescape")):
            record += line
            if line.endswith("\n") and record.count('"') % 2 == 0:
                records.append(record)
                record = ""
        return records, record


def _rows(*rows: tuple[str, str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(rows)
    return buffer.getvalue()


class TextFiles:
    """A ``.txt`` beside each picture."""

    def __init__(self, pictures: Sequence[str]) -> None:
        self.pictures = pictures

    def holds(self, file: Path) -> bool:
        return file.suffix == ".txt"

    def done(self) -> set[str]:
        return {picture for picture in self.pictures if _text_file(picture).is_file()}

    def mend(self) -> None:
        """See `Captions`; a text file is there whole or not at all."""

    def write(self, picture: str, text: str) -> None:
        path = _text_file(picture)
        if os.path.lexists(path):  # by somebody else, or under another case of letters
            raise NotWrittenError(f"There is {path} already.")
        try:
            with whole_file(path) as beside:
                beside.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise NotWrittenError(f"{path} cannot be written: {error.strerror}.") from error


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
    others: set[Path] = set()
    pictures = find_images(args.pictures, args.recursive, others)
    captions = open_captions(args.out, pictures)
    out = Path("captions" if args.out == BESIDE else args.out)
    errors = Lines(out.with_suffix(".errors.jsonl"), "error")
    broken = errors.done()
    done = captions.done() | broken
    begun = [str(path) for path in (out, errors.path) if path.suffix and path.exists()]
    if (done or begun) and not args.resume:
        what = begun[0] if begun else f"{len(done)} of {len(pictures)} text files"
        raise FileExistsError(f"There is {what} already; --resume goes on.")
    captions.mend()
    errors.mend()
    from tqdm import tqdm

    rest = [picture for picture in pictures if picture not in done]
    before = len({*pictures} & done - broken)
    bar = tqdm(total=len(pictures), initial=len(pictures) - len(rest), unit="picture", disable=None)
    with bar:
        for picture, line in caption_all(rest, args):
            if not _keep(picture, line, captions, errors):
                broken.add(picture)
            bar.update()
    failed = broken & {*pictures}
    written = len(pictures) - before - len(failed)
    others = {file for file in others if not (captions.holds(file) or errors.holds(file))}
    print(_summary(written, before, len(failed), others), file=sys.stderr)
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(pictures)} pictures have no caption; {errors.path} says why."
        )


def _keep(picture: str, line: dict[str, Any], captions: Captions, errors: Lines) -> bool:
    """Keeps the caption of a picture or its error; returns whether it has a caption."""
    try:
        if "error" in line:
            raise NotWrittenError(line["error"])
        captions.write(picture, line["text"].strip())
    except NotWrittenError as error:
        errors.write(picture, one_line(error))
        return False
    return True


def _summary(written: int, before: int, failed: int, others: Iterable[Path]) -> str:
    """What has become of everything that was found."""
    kinds = Counter(map(_kind, others))
    skipped = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    counts = {"written": written, "done before": before, "failed": failed}
    parts = [f"{count} {what}" for what, count in counts.items() if count or what == "written"]
    return ", ".join([*parts, f"{kinds.total()} skipped" + (f" ({skipped})" if skipped else "")])


def _kind(file: Path) -> str:
    """What a file is that is not captioned, in a word."""
    if not file.exists():
        return "broken link"
    return "closed folder" if file.is_dir() else file.suffix.lower() or "without ending"


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
