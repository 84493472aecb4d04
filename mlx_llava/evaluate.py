"""LLaVA's question files -> answer files -> scores (LLaVA, docs/Evaluation.md).

python -m mlx_llava.evaluate --questions question.jsonl --image-folder images \\
    --answers answers.jsonl --score exact
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_llava.analysis.scores import SCORERS
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
)
from mlx_llava.checkpoint.adapters import CONFIG, adapter_files
from mlx_llava.checkpoint.hub import EMBEDDED, Source
from mlx_llava.files import check_not_read, expand_home, is_file, is_folder
from mlx_llava.folders import fingerprint
from mlx_llava.generation.batch import BatchGenerator
from mlx_llava.generation.jobs import answer_prompts, in_order
from mlx_llava.generation.sampling import BATCH_SIZE, Options
from mlx_llava.inputs.tokenizer import IMAGE_TOKEN
from mlx_llava.json_files import JsonLines, field, read_records

SINGLE_PREDICTION = "Answer with the option's letter from the given choices directly."


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_llava.evaluate",
        description="Answer a question file of LLaVA's, and score the answers. What the answer "
        "file holds already is not asked again. Published results of LLaVA 1.5 need "
        "--template vicuna_v1 --image-mode pad.",
    )
    add_model_arguments(parser)
    add_share_arguments(parser)
    add = parser.add_argument
    add("--questions", type=Path, required=True, metavar="FILE", help="JSON lines, or ScienceQA's")
    paths = "what paths of pictures and videos are relative to"
    add("--image-folder", type=Path, default=Path(), help=paths)
    add("--answers", type=Path, required=True, metavar="FILE", help="the answer file")
    add("--score", choices=SCORERS, help="score the answers when all are there")
    add("--annotations", type=Path, metavar="PATH", help="the benchmark's own labels")
    add("--batch-size", type=int, default=BATCH_SIZE, help="answers at once (default: %(default)s)")
    add("--num-chunks", type=int, default=1, help="parts of the questions (default: 1)")
    add("--chunk-idx", type=int, default=0, help="which part, from 0 (default: 0)")
    add("--single-pred-prompt", action="store_true", help="ask for the option's letter directly")
    add_image_tokens_argument(parser)
    add_frames_argument(parser)
    add_answer_arguments(parser, max_tokens=128)
    return parser


def read_questions(path: Path, suffix: str = "") -> list[dict[str, Any]]:
    """Reads a question file: ``question_id``, ``text``, and an ``image``, a ``video`` or none.

    ScienceQA's file, a list of ``id``, ``conversations`` and perhaps ``image``, is read as the
    original's model_vqa_science.py does.

    Returns:
        list of dict: As in the file, but for the `suffix` of each text, with the ``prompt`` that
        answer files repeat, and the ``place`` in the file.

    Raises:
        ValueError: It is neither, or it is empty.
    """
    questions = [_read_question(record, str(place), suffix) for place, record in read_records(path)]
    if not questions:
        raise ValueError(f"{path} holds no question.")
    _check_distinct(questions)
    return questions


def _check_distinct(questions: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError where an answer line would not say which of two pictures it is about."""
    first: dict[tuple[Any, str], dict[str, Any]] = {}
    for question in questions:
        other = first.setdefault(identity(question), question)
        if any(question[key] != other[key] for key in ("image", "video")):
            raise ValueError(
                f"{question['place']} has the question_id {question['question_id']!r:.60} and the "
                f"text of {other['place']}, but shows something else; give it another question_id."
            )


def _read_question(record: Any, place: str, suffix: str) -> dict[str, Any]:
    if isinstance(record, dict) and "answer_id" in record:
        raise ValueError(f"{place} is an answer, expected a question.")
    image, video = (
        field(record, kind, (str, type(None)), place, default=None) for kind in ("image", "video")
    )
    if "conversations" in record:
        turns = field(record, "conversations", list, place)
        question_id = field(record, "id", (str, int), place)
        text = field(turns[0] if turns else {}, "value", str, f"{place}, first turn")
        text = text.replace(IMAGE_TOKEN, "").strip() + suffix
        prompt = f"{IMAGE_TOKEN}\n{text}" if image else text
    else:
        question_id = field(record, "question_id", (str, int), place)
        prompt = text = field(record, "text", str, place) + suffix
    found = {"question_id": question_id, "text": text, "prompt": prompt}
    return {**record, **found, "image": image, "video": video, "place": place}


def choose_chunk(items: Sequence[Any], num_chunks: int, index: int) -> Sequence[Any]:
    """One of ``num_chunks`` contiguous parts, each of ``ceil(n / num_chunks)`` or the rest.

    Raises:
        ValueError: There is no such part.
    """
    if not 0 <= index < num_chunks:
        raise ValueError(f"There is no chunk {index} of {num_chunks}.")
    size = math.ceil(len(items) / num_chunks)
    return items[index * size : (index + 1) * size]


def identity(record: dict[str, Any]) -> tuple[Any, str]:
    """What tells questions apart, and answers: ids alone do not (TextVQA's are its pictures')."""
    return record["question_id"], record["prompt"]


def model_id(args: argparse.Namespace) -> str:
    """Who answers, as answer files say it: the model's name, as the original has it.

    An adapter's follows, with a hash, as adapters of one name are trained again and again.
    """
    name = _part_name(args.model or EMBEDDED)
    if args.adapter_path is None:
        return name
    folder = Source(offline=args.offline).find(args.adapter_path)
    folder = folder.parent if folder.is_file() else folder
    files = [path for path in (folder / CONFIG, *adapter_files(folder)) if path.exists()]
    found = hashlib.sha256(" ".join(map(fingerprint, files)).encode()).hexdigest()
    return f"{name}+{_part_name(args.adapter_path)}@{found[:8]}"


def _part_name(part: str) -> str:
    """A folder's name, or a repository's; where training gave it, that of the folder around too."""
    path = expand_home(part).absolute()
    says_little = path.name in ("model", "adapter") or path.name.startswith("checkpoint-")
    return f"{path.parent.name}_{path.name}" if says_little else path.name


def read_answers(file: JsonLines) -> dict[tuple[Any, str], str]:
    """The answers that are there, by `identity`; a last line that was cut off is none.

    Raises:
        ValueError: A line is no answer.
    """
    answers = {}
    for place, answer in file.read():
        field(answer, "question_id", (str, int), place)
        field(answer, "prompt", str, place)
        answers[identity(answer)] = field(answer, "text", str, place)
    return answers


def check_answerer(file: JsonLines, expected: str) -> None:
    """Raises ValueError for an answer of another model; what other programs write may not say."""
    for place, answer in file.read():
        found = field(answer, "model_id", (str, type(None)), place, default=None)
        if found not in (None, expected):
            raise ValueError(
                f"{place} is an answer of {found:.200}, expected one of {expected}; name another "
                "--answers (or, to score what is there, neither --model nor --adapter-path)."
            )


def _check_shown(questions: Sequence[dict[str, Any]], folder: Path) -> None:
    """Raises FileNotFoundError for what is missing, before hours of answering."""
    for key, what in (("image", "pictures"), ("video", "videos")):
        named = [(q, folder / q[key]) for q in questions if q[key]]
        missing = [
            q for q, path in named if not is_file(path) and not (key == "video" and is_folder(path))
        ]
        if missing:
            raise FileNotFoundError(
                f"The {what} of {len(missing)} of {len(questions)} questions are not in "
                f"--image-folder {folder}; first, {missing[0]['place']}: {missing[0][key]:.200}"
            )


def answer_all(
    questions: Sequence[dict[str, Any]],
    file: JsonLines,
    args: argparse.Namespace,
    options: Options,
    answerer: str,
) -> None:
    """Adds the answers of some questions to the answer file in order, as they are made.

    Raises:
        ValueError: Some have none, for reasons that were said; all others are written.
    """
    from tqdm import tqdm

    def read(question: dict[str, Any]) -> dict[str, Any]:
        shown = {"images": question["image"], "videos": question["video"]}
        paths = {key: [args.image_folder / name] for key, name in shown.items() if name}
        return {"prompt": [{"role": "user", "content": question["text"]}], **paths}

    generator = BatchGenerator(*load_model(args), batch_size=args.batch_size)
    asked = {"image_tokens": args.image_tokens, "frames": args.frames}
    answers = in_order(answer_prompts(questions, read, generator, options, **asked))
    shown = tqdm(answers, total=len(questions), desc="answering", disable=None)
    failed = 0
    file.mend()
    for question, answer in zip(questions, shown, strict=True):
        if "error" in answer:
            tqdm.write(f"{question['place']}: {answer['error']}", sys.stderr)
            failed += 1
            continue
        record = {key: question[key] for key in ("question_id", "prompt")}
        record |= {"text": answer["text"].strip(), "answer_id": uuid.uuid4().hex}
        file.add({**record, "model_id": answerer, "metadata": {}})
    if failed:
        raise ValueError(
            f"{failed} of {len(questions)} questions have no answer, for the reasons above; "
            "run again when that is mended, and only they are asked."
        )


def score(
    questions: Sequence[dict[str, Any]], answers: Mapping[Any, str], args: argparse.Namespace
) -> dict[str, Any]:
    """The figures of a benchmark.

    Raises:
        ValueError: Some questions have no answer.
    """
    missing = {identity(question) for question in questions} - answers.keys()
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(questions)} questions have no answer in {args.answers}; "
            "answer all chunks into it, or concatenate their files, before --score."
        )
    answered = [{**question, "text": answers[identity(question)]} for question in questions]
    return {"questions": len(questions), **SCORERS[args.score](answered, args.annotations)}


@command(led=build_parser)
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    options = answer_options(args)
    check_not_read(args.answers, [args.questions, args.annotations])
    suffix = f"\n{SINGLE_PREDICTION}" if args.single_pred_prompt else ""
    questions = read_questions(args.questions, suffix)
    chunk = choose_chunk(questions, args.num_chunks, args.chunk_idx)
    file = JsonLines(args.answers, '{"question_id": ')
    answers = read_answers(file)
    rest = [question for question in chunk if identity(question) not in answers]
    answerer = model_id(args)
    if rest or args.model or args.adapter_path:
        check_answerer(file, answerer)
    if rest:
        _check_shown(rest, args.image_folder)
        answer_all(rest, file, args, options, answerer)
    if args.score:
        print(json.dumps(score(questions, read_answers(file), args), indent=2))


if __name__ == "__main__":
    sys.exit(main())
