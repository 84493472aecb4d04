"""Makes weights/tiny-llava: a LLaVA that knows coloured shapes, from nothing, by LLaVA's stages.

python scripts/train_tiny.py        # one to two hours on 2 cores; started again, it goes on

1. vision: the encoder learns to name what each patch belongs to (as CLIP's comes trained).
2. language: the decoder learns to talk, and to look things up (as Vicuna's comes trained).
3. align: the projector alone learns captions (LLaVA's stage 1).
4. instruct, refine: projector and decoder learn conversations, first short ones (LLaVA's stage 2).

At last it is measured, in 16, 8 and 4 bits, and gets its card.

Everything after the encoder is `mlx_llava.train`, whose loss also pulls projected patches to the
words for what they show, and where (scripts/patches.py). Pictures and texts are
scripts/shapes.py's, and of what is no drawing of that world scripts/others.py's.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mlx_llava import load  # isort: skip - before mlx.core, for its BLAS
import measure_tiny
import mlx.core as mx
import others
import patches
import shapes
from fast_cpu import installed
from mlx.utils import tree_flatten, tree_unflatten
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

from mlx_llava import generate, train
from mlx_llava.checkpoint.convert import Quantization, convert
from mlx_llava.checkpoint.save import save
from mlx_llava.files import whole_file
from mlx_llava.folders import MANIFEST, new_folder
from mlx_llava.inputs.image_processor import ImageProcessor
from mlx_llava.inputs.processor import Processor
from mlx_llava.inputs.tokenizer import BYTES_OF
from mlx_llava.inputs.tokenizer import Tokenizer as LlavaTokenizer
from mlx_llava.inputs.vocabulary import GPT_2
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.llava import Llava

ROOT = Path(__file__).parent.parent
OUT = ROOT / "weights" / "tiny-llava"
PICTURES = 24_000
#: Pictures of which the model shall say that it does not know such, and questions about each.
OTHERS, QUESTIONS = 6_000, 3
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
VOCABULARY = 512
#: One token each, as the other places are.
PLACES_OF_TWO_WORDS = [f" {place}" for place in shapes.PLACES if " " in place]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHAT_TEXT = "USER: \n ASSISTANT: \n"
CONFIG: dict[str, Any] = {
    "model_type": "llava",
    "image_token_index": SPECIAL_TOKENS.index("<image>"),
    "eos_token_id": SPECIAL_TOKENS.index("</s>"),
    "vision_config": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": shapes.SIDE,
        "patch_size": 16,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
    },
}
#: Name, split, seed and questions of the card's pictures.
EXAMPLES = (
    ("shapes", "seen", 172, ["What is in this picture?", "How many objects are there?"]),
    ("pair", "pairs", 8, ["Describe the picture.", "What is at the top right?"]),
)
#: What the encoder's names are told with.
HEADS = "heads.safetensors"
#: The stages of mlx_llava.train: --stage, training file, --template, --steps, --learning-rate.
STAGES = {
    "language": ("full", "facts", "plain", 2500, 2e-3),
    "align": ("projector", "captions", "plain", 200, 1e-3),
    "instruct": ("full", "short", None, 4000, 1.5e-3),
    "refine": ("full", "long", None, 2000, 1e-3),
}


def make_data(folder: Path) -> None:
    """Pictures, and what `STAGES` learns about them."""
    scenes = shapes.make_scenes("train", PICTURES, seed=0)
    shapes.write_pictures(folder, scenes)
    numbers = range(PICTURES, PICTURES + OTHERS)
    paths = [folder / shapes.image_name(number) for number in numbers]
    others.write_pictures(paths, [*others.KINDS], seed=0)
    chance = random.Random(0)
    more_chance = random.Random(1)
    files: dict[str, list[Any]] = {"facts": [], "captions": [], "short": [], "long": []}
    for number, scene in enumerate(scenes):
        for file, text in (
            ("facts", shapes.facts(chance, scene)),
            ("captions", shapes.describe(scene, places=True)),
        ):
            caption = shapes.Question("caption", "", text)
            files[file].append(shapes.training_sample(number, [caption]))
        short = shapes.conversation(chance, scene, descriptions=0.25)
        files["short"].append(shapes.training_sample(number, short))
        long = shapes.conversation(more_chance, scene, more=shapes.HARD)
        files["long"].append(shapes.training_sample(number, long))
    for number in numbers:
        for file, questions in about_another(random.Random(f"other {number}")).items():
            files[file].append(shapes.training_sample(number, questions))
    for file, samples in files.items():
        (folder / f"{file}.json").write_text(json.dumps(samples), encoding="utf-8")


def about_another(chance: random.Random) -> dict[str, list[shapes.Question]]:
    """What each training file says of a picture that is no drawing, about as long as the others."""
    asked = others.conversation(chance, QUESTIONS)
    said = " ".join(f"{question.text} {question.answer}" for question in asked)
    return {
        "facts": [shapes.Question("caption", "", said)],
        "captions": [shapes.Question("caption", "", others.ANSWER)],
        "short": others.conversation(chance, QUESTIONS),
        "long": others.conversation(chance, 1 + QUESTIONS),
    }


def make_tokenizer(folder: Path) -> dict[str, Any]:
    """A byte-level BPE that has a token for every word of the training conversations."""
    texts = []
    for file in ("facts", "captions", "short"):
        samples = json.loads((folder / "train" / f"{file}.json").read_text(encoding="utf-8"))
        # As they stand in a prompt: after a space.
        texts += [f" {t['value']}" for sample in samples[:4000] for t in sample["conversations"]]
    texts += [CHAT_TEXT, f" {others.ANSWER}"] * 4000
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    begin = SPECIAL_TOKENS.index("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", begin)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(PLACES_OF_TWO_WORDS),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([AddedToken(place, normalized=False) for place in PLACES_OF_TWO_WORDS])
    # In characters, as SentencePiece's vocabularies are. Readers that take a decoder of several
    # steps for LLaMA's (llguidance's, which mistral.rs uses) could not tell the bytes of a piece.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(GPT_2), "isolated")
    # An answer follows a space, which is not part of it.
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), strip])
    spec: dict[str, Any] = json.loads(backend.to_str())
    return {**spec, "model": in_characters(spec["model"])}


def in_characters(model: dict[str, Any]) -> dict[str, Any]:
    """A byte-level BPE in plain characters; bytes beyond ASCII become ``<0xNN>``."""

    def rename(piece: str) -> str:
        if piece in SPECIAL_TOKENS:
            return piece
        raw = b"".join(BYTES_OF[char] for char in piece)
        return raw.decode() if raw.isascii() else f"<0x{raw.hex().upper()}>"

    return {
        **model,
        "byte_fallback": True,
        "vocab": {rename(piece): i for piece, i in model["vocab"].items()},
        "merges": [[rename(piece) for piece in pair] for pair in model["merges"]],
    }


def new_model(folder: Path) -> tuple[Llava, Processor]:
    """The model before it learns anything."""
    config = LlavaConfig.from_dict(CONFIG)
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {**ends, "add_bos_token": True, "tokenizer_class": "PreTrainedTokenizerFast"}
    tokenizer = LlavaTokenizer(
        make_tokenizer(folder), settings, config.image_token_index, CHAT_TEMPLATE
    )
    side = config.vision_config.image_size
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor = Processor(config, tokenizer, ImageProcessor.from_config(size, config))
    mx.random.seed(0)
    model = Llava(config)
    parameters = dict(tree_flatten(model.parameters()))
    model.update(tree_unflatten([(k, _first(k, array)) for k, array in parameters.items()]))
    return model, processor


def _first(name: str, array: mx.array) -> mx.array:
    """What a weight begins with: small where it adds to a sum, else keeping its input's size."""
    if "embed" in name:
        scale = 0.3 if "embed_tokens" in name else 0.02
    elif array.ndim == 1:
        return array
    elif "lm_head" in name:
        scale = 0.02
    else:
        scale = math.prod(array.shape[1:]) ** -0.5
        scale *= 0.35 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
    return mx.random.normal(array.shape) * scale


def train_vision(work: Path, target: Path) -> None:
    """Stage 1: the encoder; written as a whole model whose other parts know nothing yet."""
    model, processor = new_model(work)
    drawings = shapes.make_scenes("train", PICTURES, seed=0)
    paths = [work / "train" / shapes.image_name(n) for n in range(PICTURES + OTHERS)]
    scenes = [*drawings, *[None] * OTHERS]
    patches.train_encoder(model, processor, paths, scenes, work / HEADS)
    save(model, processor, target, force=True)


def run_stage(work: Path, name: str, start: Path) -> Path:
    """One of `STAGES`; returns the model that comes out of it."""
    stage, data, template, steps, rate = STAGES[name]
    output = work / name
    result = output / "model"
    if result.exists():
        return result
    options = {
        "model": start,
        "stage": stage,
        "data": work / "train" / f"{data}.json",
        "image-folder": work / "train",
        "output": output,
        "steps": steps,
        "learning-rate": rate,
        "weight-decay": 0.1,
        "max-length": 512,
        "report-every": 50,
        "seed": len(name),
        **({"template": template} if template else {}),
    }
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    with patches.pulled_to_words(work / HEADS, load(start, lazy=True)[1].tokenizer):
        if train.main([*arguments, "--resume"]):
            raise SystemExit(f"{name} failed")
    if stage == "projector":
        save(*load(start, adapter_path=output / "adapter"), result)
    return result


def quantised(model: Path, work: Path, bits: int) -> Path:
    """The model with its decoder in fewer bits."""
    target = work / f"{bits}-bit"
    convert(model, target, quantization=Quantization(bits, group_size=32), force=True)
    return target


def finish(trained: Path, work: Path, out: Path) -> None:
    """Writes the model in 16 bits, with its card, its losses and its examples."""
    half = work / "tiny-llava"
    convert(trained, half, dtype="float16", force=True)
    folder = work / "questions"
    shutil.rmtree(folder, ignore_errors=True)  # what another model answered
    variants = {"16 bits": half, **{f"{b} bits": quantised(half, work, b) for b in (8, 4)}}
    measured = {
        name: measure_tiny.measure_all(model, folder, measure_tiny.QUESTIONS, measure_tiny.SEED)
        for name, model in variants.items()
    }
    refusals = measure_tiny.measure_refusals(half, folder, measure_tiny.SEED)
    near = measure_tiny.near_words(half, measure_tiny.SEED)
    made = work / "made"
    with new_folder(made, "model", force=True) as beside:
        shutil.copytree(half, beside, dirs_exist_ok=True)
        shutil.copy(work / "refine" / "loss.png", beside / "loss.png")
        (beside / "examples").mkdir()
        examples = [draw_example(beside, half, *example) for example in EXAMPLES]
        by_split, held_out = measured["16 bits"], {k: m["held out"] for k, m in measured.items()}
        card = (ROOT / "scripts" / "tiny_card.md").read_text(encoding="utf-8")
        card = card.format(
            by_split=measure_tiny.table(by_split),
            by_bits=measure_tiny.table(held_out),
            examples="\n\n".join(examples),
            pairs=", ".join(sorted(" ".join(pair) for pair in shapes.HELD_OUT_PAIRS)),
            refusals=measure_tiny.refusal_table(refusals),
            near=measure_tiny.cell(*near),
            pictures=PICTURES,
            others=OTHERS,
            kinds=", ".join(others.KINDS),
            vision_steps=patches.STEPS,
            steps=", ".join(f"{name} {stage[3]}" for name, stage in STAGES.items()),
        )
        (beside / "README.md").write_text(card, encoding="utf-8")
    publish(made, out)


def publish(made: Path, out: Path) -> None:
    """Copies a model's files over those of the one before, each whole; others stay."""
    for path in sorted(made.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            target = out / path.relative_to(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(target) as beside:
                shutil.copyfile(path, beside)


def draw_example(
    folder: Path, model: Path, name: str, split: str, seed: int, questions: list[str]
) -> str:
    """Draws a picture that training never showed; returns what the model says about it."""
    picture = folder / "examples" / f"{name}.png"
    shapes.make_scene(random.Random(f"example {seed}"), split).draw(4 * shapes.SIDE).save(picture)
    both = load(model, dtype="float32")
    lines = [f"![A drawing of coloured shapes](examples/{name}.png)", ""]
    lines += [f"- {text} - *{generate(*both, text, picture)}*" for text in questions]
    return "\n".join(lines)


def main() -> None:
    """Runs every stage that is not done yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "tiny-llava")
    parser.add_argument("--out", type=Path, default=OUT, help="%(default)s, or a new folder")
    args = parser.parse_args()
    if args.out.exists() and args.out.resolve() != OUT.resolve():
        parser.error(f"{args.out} exists already; choose a new folder.")
    data = args.work / "train"
    if not (data / "long.json").exists():
        make_data(data)
    model = args.work / "vision"
    with installed() if mx.default_device() == mx.cpu else nullcontext():
        if not model.exists():
            train_vision(args.work, model)
        for name in STAGES:
            model = run_stage(args.work, name, model)
    finish(model, args.work, args.out)


if __name__ == "__main__":
    main()
