"""Ask about pictures: one prompt, or a file of them.

    python -m mlx_llava.generate --model mlx-community/llava-1.5-7b-4bit --image photo.jpg \\
        --prompt "What is in this picture?"
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_llava.arguments import (
    MAX_REPEATS,
    Parser,
    add_answer_arguments,
    add_image_tokens_argument,
    add_model_arguments,
    add_share_arguments,
    add_video_arguments,
    answer_options,
    command,
    load_model,
    say_if_embedded,
    say_if_it_goes_round,
)
from mlx_llava.bars import reading_bar
from mlx_llava.files import lasting_name
from mlx_llava.generation.sampling import BATCH_SIZE, Options
from mlx_llava.json_files import decode, numbered_lines
from mlx_llava.model.device import DTYPES
from mlx_llava.model.ranks import rank_here

if TYPE_CHECKING:  # what --help does not wait for
    from mlx_llava import GenerationResponse, Llava, Processor
    from mlx_llava.generation.prompt_cache import PromptCache

STDIN = "standard input"
_PROMPT_OPTIONS = ("frames", "raw", "system", "image_position", "image_tokens")


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_llava.generate",
        description="Ask a LLaVA model about pictures. Only the answer goes to stdout.",
    )
    add_model_arguments(parser)
    add_share_arguments(parser)
    add = parser.add_argument
    add(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a path, an http(s) or data: URL, or - for stdin; may be given several times",
    )
    add_video_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", "-p", help="what to ask, or - to read it from stdin")
    what.add_argument(
        "--prompts-file",
        metavar="FILE",
        help='lines of {"prompt": ..., "images": [...], "videos": [...]}, or -; prints a line of '
        "JSON for each",
    )
    add("--system", help="replaces the template's system text")
    add("--raw", action="store_true", help="the prompt is the whole text, with <image> marks")
    add(
        "--image-position",
        choices=("start", "end"),
        default="start",
        help="where pictures without an <image> mark go in the question (default: start)",
    )
    add_image_tokens_argument(parser)
    add_answer_arguments(parser)
    parser.set_defaults(max_repeats=MAX_REPEATS)
    add("--batch-size", type=int, help=f"of --prompts-file (default: {BATCH_SIZE})")
    add("--kv-bits", type=int, help="store keys and values in 2, 4 or 8 bits")
    add("--max-kv-size", type=int, help="store the prompt, and so much of the answer that fits")
    add(
        "--prompt-cache-file",
        metavar="FILE",
        help="what was read before, and is not read again; written anew after the answer. Without "
        "--image and --video, its pictures are asked about",
    )
    add("--vision-dtype", choices=DTYPES, help="of the vision tower alone")
    add("--projector-dtype", choices=DTYPES, help="of the projector alone")
    add("--vision-device", choices=("cpu", "gpu"), help="where pictures are encoded")
    add("--show-prompt", action="store_true", help="print what the model reads, to stderr")
    add("--json", action="store_true", help="print one JSON object instead of the answer")
    add("--quiet", "-q", action="store_true", help="no timings on stderr")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that would not be read."""
    single = ("image", "video", "json", "show_prompt", "prompt_cache_file", "max_kv_size")
    given = [f"--{name.replace('_', '-')}" for name in single if getattr(args, name)]
    if args.prompts_file and given:
        raise ValueError(f"--prompts-file does not go with {', '.join(given)}.")
    if args.prompt is not None and args.batch_size is not None:
        raise ValueError("--batch-size is for --prompts-file.")
    if args.prompt_cache_file and rank_here() is not None:
        raise ValueError("--prompt-cache-file is for one process; start it without mlx.launch.")
    if args.prompt_cache_file and args.max_kv_size:
        raise ValueError("--prompt-cache-file does not go with --max-kv-size.")
    if [args.prompt, *args.image, *args.video].count("-") > 1:
        raise ValueError("Only one of --prompt, --image and --video can be read from stdin.")


def _prompt_options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in _PROMPT_OPTIONS}


def _answer_file(
    args: argparse.Namespace, options: Options, model: Llava, processor: Processor
) -> None:
    """Prints a line for each prompt of a file."""
    from mlx_llava.generation.batch import BatchGenerator
    from mlx_llava.generation.jobs import answer_prompts, in_order, read_line

    failed = total = 0
    is_stdin = args.prompts_file == "-"
    name = STDIN if is_stdin else args.prompts_file
    with (
        nullcontext(sys.stdin.buffer) if is_stdin else Path(name).open("rb") as file,
        reading_bar() as show,
    ):
        generator = BatchGenerator(
            *(model, processor),
            batch_size=BATCH_SIZE if args.batch_size is None else args.batch_size,
            kv_bits=args.kv_bits,
            prompt_progress_callback=show,
        )
        lines, read = numbered_lines(file, name), partial(read_line, name)
        answers = answer_prompts(lines, read, generator, options, **_prompt_options(args))
        for answer in in_order(answers):
            total, failed = total + 1, failed + ("error" in answer)
            print(json.dumps(answer, ensure_ascii=False), flush=True)
    if failed:
        raise ValueError(f"{failed} of {total} prompts have no answer; their lines say why.")


def _open_cache(args: argparse.Namespace, model: Llava) -> PromptCache | None:
    """What was read before, if a file is given for it."""
    from mlx_llava.generation.prompt_cache import PromptCache
    from mlx_llava.model.cache import make_cache

    if args.prompt_cache_file is None:
        return None
    cache = PromptCache(model)
    if Path(args.prompt_cache_file).exists():
        empty = make_cache(model.config.text_config, 0, args.kv_bits)
        cache.load(args.prompt_cache_file, empty)
    return cache


def _sources(
    args: argparse.Namespace, cache: PromptCache | None
) -> tuple[Sequence[str], Sequence[str]]:
    """The images and videos that are asked about: where none are given, a cache's."""
    images, videos = args.image, args.video
    if cache is not None:
        if not images and not videos:
            images, videos = cache.sources
        lasting = [[lasting_name(name) for name in n if name != "-"] for n in (images, videos)]
        cache.sources = (lasting[0], lasting[1])
    return images, videos


def _answer(
    args: argparse.Namespace, options: Options, model: Llava, processor: Processor, load: float
) -> None:
    """Prints the answer to the one prompt; loading took `load` seconds."""
    from mlx_llava.generation.stream import stream_generate

    prompt = args.prompt if args.prompt != "-" else decode(sys.stdin.buffer.read(), STDIN).strip()
    cache = _open_cache(args, model)
    images, videos = (
        [sys.stdin.buffer.read() if name == "-" else name for name in names]
        for names in _sources(args, cache)
    )
    inputs = processor(prompt, images, video=videos, **_prompt_options(args))
    if args.show_prompt:
        print(*inputs.prompts, sep="\n", file=sys.stderr)
    tokens = []
    with reading_bar() as show:
        for part in stream_generate(
            *(model, processor, inputs),
            kv_bits=args.kv_bits,
            max_kv_size=args.max_kv_size,
            prompt_cache=cache,
            prompt_progress_callback=show,
            **vars(options),
        ):
            tokens.append(part.token)
            if not args.json:
                print(part.text, end="", flush=True)
    print(_as_json(prompt, tokens, part, load) if args.json else "")
    if cache is not None:
        cache.save(args.prompt_cache_file)
    if not args.quiet:
        say_if_it_goes_round(part)
        print(_report(part, load), file=sys.stderr)


def _as_json(prompt: str, tokens: list[int], last: GenerationResponse, load: float) -> str:
    """The object that ``--json`` prints."""
    figures = last.figures()
    figures["timings"] = {"load": load, **figures["timings"]}
    answer = {"text": last.answer, "prompt": prompt, "tokens": tokens, **figures}
    return json.dumps(answer, ensure_ascii=False)


def _report(last: GenerationResponse, load: float) -> str:
    """The lines of timings for people."""
    from mlx_llava.inputs.inputs import in_part

    shown = in_part(last.whole_image_tokens, last.image_tokens)
    videos = last.inputs.videos
    images = len(last.inputs.image_tokens) - sum(len(video.images) for video in videos)
    pixels = [f"images: {images}"] if images else []
    pixels += [f"video: {v.frames} frames, {v.frame_tokens} tokens each" for v in videos]
    lines = [f"{' | '.join(pixels)}, {shown} tokens"] if pixels else []
    lines += [
        f"load {load:.2f} s | preprocess {last.preprocess_seconds:.2f} s | "
        f"encode {last.encode_seconds:.2f} s",
        f"prefill {last.prompt_tokens} tokens, {last.prefill_seconds:.2f} s, "
        f"{last.prompt_tps:.1f} tokens/s | decode {last.generation_tokens} tokens, "
        f"{last.decode_seconds:.2f} s, {last.generation_tps:.1f} tokens/s",
        f"peak memory {last.peak_memory:.2f} GB",
    ]
    return "\n".join(lines)


@command(led=build_parser)
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    _check(args)
    options = answer_options(args)
    if args.quiet:
        logging.getLogger("mlx_llava").setLevel(logging.ERROR)
    else:
        say_if_embedded(args)
    started = time.perf_counter()
    model, processor = load_model(args)
    if args.prompts_file is None:
        _answer(args, options, model, processor, time.perf_counter() - started)
    else:
        _answer_file(args, options, model, processor)


if __name__ == "__main__":
    sys.exit(main())
