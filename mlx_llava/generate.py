"""Ask about a picture: `generate_step` (ids) -> `stream_generate` (text) -> `generate`.

L tokens of the prompt, D decoder width, V vocabulary.

    python -m mlx_llava.generate --model llava-hf/llava-1.5-7b-hf --image photo.jpg \\
        --prompt "What is in this picture?"
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from mlx_llava.command import add_source_arguments, command, source_options
from mlx_llava.hub import EMBEDDED_NOTE
from mlx_llava.llama import Cache, LanguageModel
from mlx_llava.llava import Llava
from mlx_llava.load import DTYPES, load
from mlx_llava.preprocess import MODES
from mlx_llava.processor import Conversation, Inputs, Processor
from mlx_llava.sampling import (
    LogitsProcessor,
    Sampler,
    make_logits_processors,
    make_sampler,
)
from mlx_llava.streaming import StopMatcher, StreamingDecoder

MAX_TOKENS = 512
PREFILL_STEP = 2048


@dataclass(frozen=True)
class GenerationResponse:
    """What one step of `stream_generate` yields.

    Attributes:
        text: the text that became readable with this token.
        token: its id.
        logprobs: the log-probabilities it was chosen from, (V,).
        prompt_tokens: the length of the prompt, placeholders of pictures included.
        prompt_tps: tokens per second of prefill.
        generation_tokens: how many tokens were generated so far.
        generation_tps: tokens per second of decoding.
        peak_memory: the most memory that MLX held so far, in GB.
        finish_reason: None, or ``stop`` or ``length`` in the last response.
        image_tokens: how many of the prompt's tokens are pictures.
        preprocess_seconds: reading pictures, cutting them, tokenising.
        encode_seconds: vision tower and projector.
        prefill_seconds: reading the prompt, up to the first token.
        decode_seconds: everything after the first token.
    """

    text: str
    token: int
    logprobs: mx.array
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None
    image_tokens: int
    preprocess_seconds: float
    encode_seconds: float
    prefill_seconds: float
    decode_seconds: float


def prefill(
    embeddings: mx.array, language_model: LanguageModel, cache: Cache, step: int
) -> mx.array:
    """Reads a prompt in chunks, so that memory does not grow with its square.

    Returns:
        mx.array: The logits after its last token, (1, V).
    """
    length = embeddings.shape[1]
    for start in range(0, length - step, step):
        language_model(input_embeddings=embeddings[:, start : start + step], cache=cache)
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
    rest = (length - 1) // step * step
    logits = language_model(input_embeddings=embeddings[:, rest:], cache=cache, last_only=True)
    return logits[:, -1]


def generate_step(
    embeddings: mx.array,
    language_model: LanguageModel,
    *,
    cache: Cache | None = None,
    max_tokens: int = MAX_TOKENS,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    prompt_ids: mx.array | None = None,
    prefill_step: int = PREFILL_STEP,
) -> Generator[tuple[int, mx.array], None, None]:
    """Continues a prompt, one id at a time.

    Args:
        embeddings (mx.array): The prompt, (1, L, D); `Llava.embed` makes them.
        language_model (LanguageModel): The decoder.
        cache (list[KVCache], optional): What came before; is extended.
        max_tokens (int): How many tokens to make.
        sampler (callable, optional): Log-probabilities -> ids. Default: the likeliest.
        logits_processors (list of callables): (ids so far, logits) -> logits, as in mlx-lm.
        prompt_ids (mx.array, optional): The prompt's text for the logits processors, (L,).
        prefill_step (int): The length of the chunks in which the prompt is read.

    Yields:
        tuple[int, mx.array]: A token and the log-probabilities that it was chosen from, (V,).
    """
    cache = language_model.make_cache() if cache is None else cache
    sampler = sampler or make_sampler(0, 0, 0, 0)
    seen = mx.zeros((0,), mx.int32) if prompt_ids is None else prompt_ids

    def choose(logits: mx.array) -> tuple[mx.array, mx.array]:
        logits = logits.astype(mx.float32)  # in 16 bits, subtracting would make ties
        for process in logits_processors:
            logits = process(seen, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token = sampler(logprobs)
        mx.async_eval(token, logprobs)
        return token, logprobs

    token, logprobs = choose(prefill(embeddings, language_model, cache, prefill_step))
    for n in range(1, max_tokens + 1):
        following = None
        if n < max_tokens:  # queue the next step before this token is waited for
            if logits_processors:
                seen = mx.concatenate([seen, token])
            following = choose(language_model(token[:, None], cache=cache)[:, -1])
        yield cast("int", token.item()), logprobs[0]
        if following is not None:
            token, logprobs = following


def limit_tokens(prompt_tokens: int, max_tokens: int, context_length: int) -> int:
    """How many tokens can be made; raises ValueError where there is room for none."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1.")
    if prompt_tokens >= context_length:
        raise ValueError(
            f"The prompt has {prompt_tokens} tokens and the model's context is {context_length}; "
            "use fewer or smaller images, or a shorter text."
        )
    return min(max_tokens, context_length - prompt_tokens)


def stream_generate(
    model: Llava,
    processor: Processor,
    prompt: Conversation | Inputs,
    image: Any = None,
    *,
    max_tokens: int = MAX_TOKENS,
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    top_k: int = 0,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    prefill_step: int = PREFILL_STEP,
    **prompt_options: Any,
) -> Generator[GenerationResponse, None, None]:
    """Answers a prompt, piece by piece.

    Args:
        model (Llava): The model.
        processor (Processor): Its processor.
        prompt (str, list of dict or Inputs): What `Processor` takes, or what it made.
        image (image or list of images, optional): What `load_image` takes.
        max_tokens (int): The longest answer; less if the context is full before.
        temp (float): Temperature; 0 takes the likeliest token.
        top_p (float): Samples from the likeliest tokens of this total probability.
        min_p (float): Drops tokens below this fraction of the likeliest one's probability.
        top_k (int): Samples from that many likeliest tokens.
        repetition_penalty (float, optional): Above 1, tokens of the last 20 become less likely.
        seed (int, optional): Makes sampling repeatable.
        stop (list of str): Texts that end the answer, beside the template's own.
        prefill_step (int): The length of the chunks in which the prompt is read.
        **prompt_options: ``raw``, ``system``, ``image_position`` of `Processor`.

    Yields:
        GenerationResponse: The last one has a ``finish_reason``.

    Raises:
        ValueError: The prompt is longer than the context, or `Processor` refuses it.
    """
    inputs = prompt
    if not isinstance(inputs, Inputs):
        inputs = processor(inputs, image, **prompt_options)
    elif image is not None or prompt_options:
        raise ValueError("Inputs are complete; images and options belong to the processor's call.")
    rows, prompt_tokens = inputs.input_ids.shape
    if rows != 1:
        raise ValueError(f"One prompt can be answered at a time; the inputs hold {rows}.")
    max_tokens = limit_tokens(prompt_tokens, max_tokens, processor.context_length)
    sampler = make_sampler(temp, top_p, min_p, top_k)
    penalties = make_logits_processors(repetition_penalty)
    if seed is not None:
        mx.random.seed(seed)
    started = time.perf_counter()
    embeddings = model.embed(**inputs)
    mx.eval(embeddings)
    encoded = time.perf_counter()

    ids = cast("list[int]", inputs.input_ids[0].tolist())
    text_ids = [i for i in ids if i != model.config.image_token_index]
    tokens = generate_step(
        embeddings,
        model.language_model,
        max_tokens=max_tokens,
        sampler=sampler,
        logits_processors=penalties,
        prompt_ids=mx.array(text_ids, mx.int32),
        prefill_step=prefill_step,
    )
    decoder = StreamingDecoder(processor.tokenizer)
    matcher = StopMatcher([*processor.template.stops, *stop])
    prefilled = encoded
    for n, (token, logprobs) in enumerate(tokens, 1):
        if n == 1:
            prefilled = time.perf_counter()
        finish_reason = None
        if token in processor.eos_ids:
            text, finish_reason = decoder.flush(), "stop"
        else:
            text = decoder.add(token)
            if n == max_tokens:
                text, finish_reason = text + decoder.flush(), "length"
        text, stopped = matcher.add(text)
        if stopped:
            finish_reason = "stop"
        elif finish_reason:
            text += matcher.flush()
        decode_seconds = time.perf_counter() - prefilled
        yield GenerationResponse(
            text=text,
            token=token,
            logprobs=logprobs,
            prompt_tokens=prompt_tokens,
            prompt_tps=prompt_tokens / max(prefilled - encoded, 1e-9),
            generation_tokens=n,
            generation_tps=(n - 1) / max(decode_seconds, 1e-9),
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish_reason,
            image_tokens=sum(inputs.image_tokens),
            preprocess_seconds=inputs.seconds,
            encode_seconds=encoded - started,
            prefill_seconds=prefilled - encoded,
            decode_seconds=decode_seconds,
        )
        if finish_reason:
            return


def generate(
    model: Llava,
    processor: Processor,
    prompt: Conversation | Inputs,
    image: Any = None,
    **options: Any,
) -> str:
    """Answers a prompt; arguments as in `stream_generate`.

    Returns:
        str: The answer.
    """
    return "".join(
        part.text for part in stream_generate(model, processor, prompt, image, **options)
    )


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="mlx_llava.generate",
        description="Ask a LLaVA model about pictures. Only the answer goes to stdout.",
    )
    add = parser.add_argument
    add("--model", help="a folder, a GGUF file, or a hub repository (default: embedded)")
    add("--adapter-path", metavar="DIR", help="what mlx_llava.train made of the model")
    add(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="a path, an http(s) or data: URL, or - for stdin; may be given several times",
    )
    add("--prompt", "-p", required=True, help="what to ask, or - to read it from stdin")
    add("--system", help="replaces the template's system text")
    add("--template", help="a built-in template instead of the checkpoint's own")
    add("--raw", action="store_true", help="the prompt is the whole text, with <image> marks")
    add("--image-mode", choices=MODES, help="how pictures are cut (default: the checkpoint's)")
    add(
        "--image-position",
        choices=("start", "end"),
        default="start",
        help="where pictures without an <image> mark go in the question (default: start)",
    )
    add("--max-tokens", "-m", type=int, default=MAX_TOKENS, help="(default: %(default)s)")
    add("--temp", type=float, default=0.0, help="temperature (default: 0, the likeliest word)")
    add("--top-p", type=float, default=0.0, help="nucleus sampling (default: off)")
    add("--min-p", type=float, default=0.0, help="minimum relative probability (default: off)")
    add("--top-k", type=int, default=0, help="sample from the k likeliest (default: off)")
    add("--repetition-penalty", type=float, help="above 1 makes repetition less likely")
    add("--seed", type=int, help="makes sampling repeatable")
    add("--stop", action="append", default=[], help="a text that ends the answer; repeatable")
    add("--dtype", choices=DTYPES, help="of all weights (default: as in the checkpoint)")
    add("--vision-dtype", choices=DTYPES, help="of the vision tower alone")
    add("--projector-dtype", choices=DTYPES, help="of the projector alone")
    add("--vision-device", choices=("cpu", "gpu"), help="where pictures are encoded")
    add_source_arguments(parser)
    add("--show-prompt", action="store_true", help="print what the model reads, to stderr")
    add("--json", action="store_true", help="print one JSON object instead of the answer")
    add("--quiet", "-q", action="store_true", help="no timings on stderr")
    return parser


def _from_stdin(args: argparse.Namespace) -> tuple[str, list[Any]]:
    """The prompt and the images, with ``-`` replaced by what stdin holds."""
    if [args.prompt, *args.image].count("-") > 1:
        raise ValueError("Only one of --prompt and --image can be read from stdin.")
    prompt = sys.stdin.read().strip() if args.prompt == "-" else args.prompt
    images = [sys.stdin.buffer.read() if image == "-" else image for image in args.image]
    return prompt, images


def _report(last: GenerationResponse, load_seconds: float, images: int) -> str:
    """The lines of timings for people."""
    lines = []
    if images:
        lines.append(f"images: {images}, {last.image_tokens} tokens")
    lines.append(
        f"load {load_seconds:.2f} s | preprocess {last.preprocess_seconds:.2f} s | "
        f"encode {last.encode_seconds:.2f} s"
    )
    lines.append(
        f"prefill {last.prompt_tokens} tokens, {last.prefill_seconds:.2f} s, "
        f"{last.prompt_tps:.1f} tokens/s | decode {last.generation_tokens} tokens, "
        f"{last.decode_seconds:.2f} s, {last.generation_tps:.1f} tokens/s"
    )
    lines.append(f"peak memory {last.peak_memory:.2f} GB")
    return "\n".join(lines)


def _as_json(
    prompt: str, text: str, tokens: list[int], last: GenerationResponse, load_seconds: float
) -> str:
    """The object that ``--json`` prints."""
    return json.dumps(
        {
            "text": text,
            "prompt": prompt,
            "tokens": tokens,
            "prompt_tokens": last.prompt_tokens,
            "image_tokens": last.image_tokens,
            "generation_tokens": last.generation_tokens,
            "finish_reason": last.finish_reason,
            "timings": {
                "load": load_seconds,
                "preprocess": last.preprocess_seconds,
                "encode": last.encode_seconds,
                "prefill": last.prefill_seconds,
                "decode": last.decode_seconds,
            },
            "peak_memory": last.peak_memory,
        },
        ensure_ascii=False,
    )


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = build_parser().parse_args(argv)
    prompt, images = _from_stdin(args)
    if args.model is None and not args.quiet:
        print(EMBEDDED_NOTE, file=sys.stderr)
    started = time.perf_counter()
    model, processor = load(
        args.model,
        adapter_path=args.adapter_path,
        dtype=args.dtype,
        vision_dtype=args.vision_dtype,
        projector_dtype=args.projector_dtype,
        vision_device=args.vision_device,
        image_mode=args.image_mode,
        template=args.template,
        **source_options(args),
    )
    load_seconds = time.perf_counter() - started
    inputs = processor(
        prompt, images, raw=args.raw, system=args.system, image_position=args.image_position
    )
    if args.show_prompt:
        print(*inputs.prompts, sep="\n", file=sys.stderr)
    text, tokens = "", []
    for part in stream_generate(
        model,
        processor,
        inputs,
        max_tokens=args.max_tokens,
        temp=args.temp,
        top_p=args.top_p,
        min_p=args.min_p,
        top_k=args.top_k,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=args.stop,
    ):
        text += part.text
        tokens.append(part.token)
        if not args.json:
            print(part.text, end="", flush=True)
    print(_as_json(prompt, text, tokens, part, load_seconds) if args.json else "")
    if not args.quiet:
        print(_report(part, load_seconds, len(images)), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
