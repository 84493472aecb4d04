"""Prompt, images and videos -> what the model reads.

B prompts, L tokens (the longest prompt; shorter ones are padded on the left), N tiles.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, takewhile
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mlx_llava.inputs.chat_template import ChatTemplate
from mlx_llava.inputs.image import load_image
from mlx_llava.inputs.image_processor import ImageProcessor
from mlx_llava.inputs.inputs import FramesTaken, Inputs
from mlx_llava.inputs.messages import (
    Conversation,
    Message,
    Reading,
    Shown,
    as_list,
    read_messages,
    rows_of,
)
from mlx_llava.inputs.templates import choose_template, get_template
from mlx_llava.inputs.tokenizer import IM_END, IM_START, IMAGE_TOKEN, VIDEO_TOKEN, Tokenizer
from mlx_llava.inputs.video import FRAMES, KNOWN_FRAMES, Video, VideoSource, is_ready, load_video
from mlx_llava.model.anyres import Frames, Layout
from mlx_llava.model.config import LlavaConfig
from mlx_llava.model.positions import Ids


class Learnable(NamedTuple):
    """A conversation to be learned.

    Attributes:
        ids: its tokens, one placeholder for each feature.
        learned: which of them belong to an answer.
        images: what it shows, in the order of its placeholders.
    """

    ids: list[int]
    learned: list[bool]
    images: list[Image.Image | Video]


class Processor:
    """Tokenizer, image processor and chat template of one checkpoint.

    Attributes:
        template: writes conversations as prompts, and knows the texts that end an answer.
        eos_ids: token ids that end an answer.
        context_length: how many tokens the decoder can read and write in all.
        frames: how many frames are taken of a video, where nothing says it.
    """

    def __init__(
        self,
        config: LlavaConfig,
        tokenizer: Tokenizer,
        image_processor: ImageProcessor,
        template: ChatTemplate | None = None,
        eos_ids: Iterable[int] = (),
    ) -> None:
        """Puts the parts together; `choose_template` has the default.

        Answers end with `eos_ids` and with those of config, tokenizer and template.
        """
        self.config, self.tokenizer, self.image_processor = config, tokenizer, image_processor
        self.template = template or choose_template(config, tokenizer)
        self.context_length = config.text_config.context_length
        self.frames = KNOWN_FRAMES if config.pooling else FRAMES
        # The original has one mark for all that is shown.
        knows_mark = VIDEO_TOKEN in tokenizer.special_tokens
        self._marks = [IMAGE_TOKEN, *([VIDEO_TOKEN] if config.pooling and knows_mark else [])]
        ends = {tokenizer.special_tokens.get(stop) for stop in self.template.stops}
        ends |= {*eos_ids, *config.eos_token_id, tokenizer.eos_id}
        self.eos_ids = frozenset(end for end in ends if end is not None)

    def with_template(self, name: str) -> Processor:
        """The same with a built-in template.

        Raises:
            ValueError: There is none of that name.
        """
        parts = (self.config, self.tokenizer, self.image_processor)
        return Processor(*parts, get_template(name), self.eos_ids)

    def __call__(
        self,
        prompt: Conversation | Sequence[Conversation],
        images: Shown | Sequence[Any] | None = None,
        *,
        video: Any = None,
        frames: int | None = None,
        raw: bool = False,
        system: str | None = None,
        prefill: str = "",
        image_position: str = "start",
        image_tokens: int | None = None,
    ) -> Inputs:
        """Prepares one prompt, or a batch of them.

        Args:
            prompt: A question, a conversation in OpenAI's shape, or a list of prompts for a batch.
            images: Images as `load_image` takes them. For a batch, one list (or None) for each
                prompt.
            video: A video as `load_video` takes it, or several in a list; for a batch, as images.
                A model that knows no video sees its frames as images.
            frames: How many frames are taken of each video. Default: as many as the model was
                trained with, or 8.
            raw: The prompt is the whole text already, with its ``<image>`` marks and special
                tokens; no template is applied.
            system: Replaces the template's system text.
            prefill: How the answer begins; what is generated goes on from there.
            image_position: ``start`` or ``end``: where images and videos without a mark go in
                their turn.
            image_tokens: Shows at most so many of the features of each image or frame, those that
                differ most (DivPrune); an image is read the faster, and seen less well.

        Returns:
            For ``model(**inputs)`` or ``model.embed(**inputs)``.

        Raises:
            ValueError: Marks and images do not match, or an image or a video cannot be read.
        """
        if image_position not in ("start", "end"):
            raise ValueError(f"image_position is {image_position!r}; known: start, end.")
        if image_tokens is not None and image_tokens < 1:
            raise ValueError(f"image_tokens is {image_tokens}; it must be at least 1.")
        started = time.perf_counter()
        texts, rows = list[str](), list[Sequence[Shown]]()
        take_frames = partial(self.load_video, frames=frames)
        for conversation, beside, films in rows_of(prompt, images, video):
            beside = [*beside, *map(take_frames, films)]
            reading = self._reading(take_frames)
            text, ordered = self._render(
                *(conversation, beside, reading, raw, system, image_position), prefill=prefill
            )
            texts.append(text)
            rows.append(ordered)
        tiles = self.image_processor.batch(map(self._images_of, rows))
        whole = tiles.whole_image_tokens
        layouts = tiles.image_sizes or [None] * len(whole)
        counts = tuple(map(partial(_shown, image_tokens), whole, layouts))
        ids, mask = self._ids(texts, counts)
        folded = iter(counts)
        return Inputs(
            input_ids=ids,
            attention_mask=None if mask.all() else mask,
            **tiles._asdict(),
            prompts=tuple(self._fold(text, folded) for text in texts),
            image_tokens=counts,
            videos=tuple(self._frames_taken([*chain(*rows)], whole)),
            prefill=prefill if prefill.strip() else "",
            seconds=time.perf_counter() - started,
            image_processor=self.image_processor,
        )

    def count_tokens(
        self, conversation: Conversation, images: Shown | Sequence[Shown] | None = None
    ) -> int:
        """How many tokens a prompt takes; its images are read, but not made pixels."""
        reading = self._reading(self.load_video)
        text, sources = self._render(conversation, as_list(images), reading)
        read = self.image_processor.read(self._images_of(sources))
        return self._ids([text], (one.tokens for one in read))[0].shape[1]

    def _reading(self, load_video: Callable[[VideoSource], Video]) -> Reading:
        mark = self._marks[-1] if self.config.pooling else None
        return Reading(self.tokenizer.protect, load_video, mark)

    def _render(
        self,
        conversation: Conversation,
        images: Sequence[Shown],
        reading: Reading,
        raw: bool = False,
        system: str | None = None,
        image_position: str = "start",
        prefill: str = "",
    ) -> tuple[str, Sequence[Shown]]:
        """The prompt's text, and what its marks stand for."""
        if raw:
            if not isinstance(conversation, str):
                raise ValueError("A raw prompt must be a text.")
            text = conversation + prefill
        else:
            messages, images = read_messages(conversation, images, reading)
            if system is not None:
                messages = [message for message in messages if message.role != "system"]
                messages.insert(0, Message("system", self.tokenizer.protect(system)))
            if image_position == "end":
                messages = [*map(self.template.images_last, messages)]
            text = self.template.render(messages, self.tokenizer.protect(prefill))
            text = self._wrapped(text)
        return text, self._in_order(text, images, reading)

    def _in_order(self, text: str, shown: Sequence[Shown], reading: Reading) -> Sequence[Shown]:
        """What is shown, in the order of its marks; raises ValueError unless all have theirs."""
        needed = [mark for source in shown for mark in reading.marks_of(source)]
        for mark in self._marks:
            if (found := text.count(mark)) != (count := needed.count(mark)):
                given = f"{count} {mark.strip('<>')}s were given"
                raise ValueError(f"The prompt has {found} {mark} marks but {given}.")
        if VIDEO_TOKEN not in self._marks:
            return shown
        kinds = {
            IMAGE_TOKEN: iter([one for one in shown if not isinstance(one, Video)]),
            VIDEO_TOKEN: iter([one for one in shown if isinstance(one, Video)]),
        }
        return [next(kinds[mark]) for mark in re.findall("|".join(self._marks), text)]

    def _images_of(self, shown: Iterable[Shown]) -> list[Image.Image | Video]:
        """What is shown as it is read: videos whole, or as their frames."""
        images = list[Image.Image | Video]()
        for source in shown:
            if not isinstance(source, Video):
                images.append(load_image(source))
            else:
                images += [source] if self.config.pooling else source.frames
        return images

    def _frames_taken(
        self, shown: Iterable[Shown], image_tokens: Sequence[int]
    ) -> Iterator[FramesTaken]:
        """What was taken of videos, with the tokens of all images in reading order."""
        images = range(0)
        for source in shown:
            frames = len(source.frames) if isinstance(source, Video) else 1
            images = range(images.stop, images.stop + (1 if self.config.pooling else frames))
            if isinstance(source, Video):
                total = sum(image_tokens[i] for i in images)
                yield FramesTaken(frames, total // frames, images)

    def load_video(self, source: VideoSource, frames: int | None = None) -> Video:
        """Takes frames of a video, by default as many as the model knows; see `load_video`."""
        return load_video(
            source, self.frames if frames is None and not is_ready(source) else frames
        )

    def _wrapped(self, text: str) -> str:
        """With LLaVA v0's marks around every image."""
        if not self.config.mm_use_im_start_end:
            return text
        return text.replace(IMAGE_TOKEN, IM_START + IMAGE_TOKEN + IM_END)

    def learnable(self, conversation: Sequence[Message], shown: Sequence[Shown]) -> Learnable:
        """Tokenises a conversation to be learned, which shows just these images and videos.

        A token belongs to an answer if it is not yet there when the text before that answer is
        tokenised, as it is not when that text is the prompt.

        Raises:
            ValueError: The template cannot write it.
        """
        reading = self._reading(self.load_video)
        messages, shown = read_messages(conversation, shown, reading)
        segments = self.template.segments(messages)
        whole = "".join(segment.text for segment in segments)
        images = self._images_of(self._in_order(whole, shown, reading))
        counts = (one.tokens for one in self.image_processor.read(images))
        text, ids, learned = "", list[int](), list[bool]()
        for segment in segments:
            text += self._wrapped(segment.text)
            longer = self.tokenizer.encode(text)
            both = zip(ids, longer, strict=False)
            same = len([*takewhile(lambda pair: pair[0] == pair[1], both)])
            learned = learned[:same] + [segment.answer] * (len(longer) - same)
            ids = longer
        repeats = self._repeats(ids, counts)
        ids, learned = (np.repeat(row, repeats).tolist() for row in (ids, learned))
        return Learnable(ids, learned, images)

    def _ids(self, texts: Sequence[str], counts: Iterable[int]) -> tuple[Ids, Ids]:
        """The ids of prompts, padded on the left, and the mask of what is no padding."""
        remaining = iter(counts)
        encoded = map(self.tokenizer.encode, texts)
        rows = [np.repeat(ids, self._repeats(ids, remaining)) for ids in encoded]
        ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            start = ids.shape[1] - len(row)
            ids[i, start:], mask[i, start:] = row, 1
        return ids, mask

    def _repeats(self, ids: list[int], counts: Iterator[int]) -> list[int]:
        """How often each token stands in the prompt: an image's once for each feature."""
        shown = self.config.are_placeholders(np.array(ids))
        return [next(counts) if is_shown else 1 for is_shown in shown]

    def _fold(self, text: str, counts: Iterator[int]) -> str:
        """A prompt as people read it, each image's placeholders as their count."""
        ids, special = self.tokenizer.bos_ids, self.tokenizer.special_tokens
        bos = "".join(token for token, i in special.items() if i in ids)
        marks = re.compile("|".join(self._marks))
        folded = marks.sub(lambda m: f"{m[0][:-1]} x {next(counts)}>", text.removeprefix(bos))
        return self.tokenizer.unprotect(bos + folded)


def _shown(most: int | None, tokens: int, layout: Layout) -> int:
    """How many of its tokens an image is shown in, or a video, where `most` is for each frame."""
    if most is None:
        return tokens
    return min(tokens, most * layout.frames if isinstance(layout, Frames) else most)
