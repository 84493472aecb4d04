"""The original LLaVA's conversation templates by name (LLaVA and LLaVA-NeXT, conversation.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mlx_llava.inputs.chat_template import ChatTemplate, Segment, place_images
from mlx_llava.inputs.messages import Message, check_turns
from mlx_llava.inputs.tokenizer import IMAGE_TOKEN


@dataclass(frozen=True)
class Template(ChatTemplate):
    """A built-in template, as the segments that it puts around what is said.

    Attributes:
        name: the name in LLaVA's conversation.py.
        system: the system text unless the user gives one.
        header: what opens the prompt, around ``{system}``.
        bare_header: what opens it when the system text is empty.
        user: a question, around ``{text}``.
        assistant: what announces an answer.
        answer: a past answer, around ``{text}``.
        between: what stands between an answer and the next question.
        stops: texts that end an answer.
        image_joint: what stands between a picture and the text.
        examples: turns that precede the conversation.
        image_turn: pictures get a turn of their own, acknowledged with "Received."
    """

    name: str
    system: str
    header: str
    user: str
    assistant: str
    answer: str
    stops: tuple[str, ...]
    bare_header: str = ""
    between: str = ""
    image_joint: str = "\n"
    examples: tuple[Message, ...] = ()
    image_turn: bool = False

    def segments(
        self, messages: Sequence[Message], image_position: str = "start"
    ) -> tuple[Segment, ...]:
        """Writes the conversation; see `ChatTemplate`."""
        check_turns(messages)
        system = self.system
        if messages[0].role == "system":
            system, messages = messages[0].text, messages[1:]
        segments = [
            Segment(self.header.replace("{system}", system) if system else self.bare_header)
        ]
        turns = [*self.examples, *self._images_first(messages)]
        inserted = len(turns) - len(messages)
        for i, message in enumerate(turns):
            if message.role == "assistant":
                segments += self._answer(message.text, learned=i >= inserted)
                continue
            said = place_images(message, self.image_joint, image_position)
            between = self.between if i else ""
            segments.append(Segment(between + self.user.replace("{text}", said) + self.assistant))
        return tuple(segments)

    def _answer(self, text: str, learned: bool) -> list[Segment]:
        """An answer up to its end mark, and what the template puts after that."""
        mark = next(stop for stop in self.stops if stop in self.answer)
        written, after = self.answer.rsplit(mark, 1)
        return [Segment(written.replace("{text}", text) + mark, learned), Segment(after)]

    def _images_first(self, messages: Sequence[Message]) -> list[Message]:
        """Moves the first turn's pictures to a turn of their own (mmtag templates)."""
        first, *rest = messages
        count = first.images + first.text.count(IMAGE_TOKEN)
        if not self.image_turn or not count:
            return [*messages]
        shown = Message("user", f"<Image>{IMAGE_TOKEN}</Image>" * count)
        asked = Message("user", first.text.replace(IMAGE_TOKEN, "").strip())
        return [shown, Message("assistant", "Received."), asked, *rest]


_CURIOUS = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is "
    "able to understand the visual content that the user provides, and assist the user with a "
    # The missing space is the original's.
    "variety of tasks using natural language.The visual content will be provided with the "
    "following format: <Image>visual content</Image>."
)
_HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
_RENEWABLE = (
    Message(
        "user",
        "What are the key differences between renewable and non-renewable energy sources?",
    ),
    Message(
        "assistant",
        "Renewable energy sources are those that can be replenished naturally in a relatively "
        "short amount of time, such as solar, wind, hydro, geothermal, and biomass. "
        "Non-renewable energy sources, on the other hand, are finite and will eventually be "
        "depleted, such as coal, oil, and natural gas. Here are some key differences between "
        "renewable and non-renewable energy sources:\n"
        "1. Availability: Renewable energy sources are virtually inexhaustible, while "
        "non-renewable energy sources are finite and will eventually run out.\n"
        "2. Environmental impact: Renewable energy sources have a much lower environmental "
        "impact than non-renewable sources, which can lead to air and water pollution, "
        "greenhouse gas emissions, and other negative effects.\n"
        "3. Cost: Renewable energy sources can be more expensive to initially set up, but they "
        "typically have lower operational costs than non-renewable sources.\n"
        "4. Reliability: Renewable energy sources are often more reliable and can be used in "
        "more remote locations than non-renewable sources.\n"
        "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
        "different situations and needs, while non-renewable sources are more rigid and "
        "inflexible.\n"
        "6. Sustainability: Renewable energy sources are more sustainable over the long term, "
        "while non-renewable sources are not, and their depletion can lead to economic and "
        "social instability.\n",
    ),
)

_VICUNA_V1 = Template(
    name="vicuna_v1",
    system=_CURIOUS.replace("{who}", "user"),
    header="{system} ",
    user="USER: {text} ",
    assistant="ASSISTANT:",
    answer=" {text}</s>",
    stops=("</s>",),
)
_LLAVA_V0 = Template(
    name="llava_v0",
    system=_CURIOUS.replace("{who}", "human"),
    header="{system}###",
    user="Human: {text}###",
    assistant="Assistant:",
    answer=" {text}###",
    stops=("###",),
)
_LLAVA_LLAMA_2 = Template(
    name="llava_llama_2",
    system=_HELPFUL,
    header="[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
    bare_header="[INST] ",
    user="{text} [/INST]",
    assistant="",
    answer=" {text} </s>",
    between="<s>[INST] ",
    stops=("</s>",),
)
_MPT = Template(
    name="mpt",
    system=(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives "
        "helpful and honest answers."
    ),
    header="<|im_start|>system\n{system}<|im_end|>",
    user="<|im_start|>user\n{text}<|im_end|>",
    assistant="<|im_start|>assistant\n",
    answer="{text}<|im_end|>",
    stops=("<|im_end|>",),
)
_CHATML_DIRECT = replace(_MPT, name="chatml_direct", system="Answer the questions.")

_ALL: tuple[Template, ...] = (
    _VICUNA_V1,
    replace(_VICUNA_V1, name="llava_v1", system=_LLAVA_V0.system),
    replace(_VICUNA_V1, name="v1_mmtag", system=_MMTAG, image_turn=True),
    _LLAVA_V0,
    replace(_LLAVA_V0, name="vicuna_v0", examples=_RENEWABLE),
    replace(_LLAVA_V0, name="v0_mmtag", system=_MMTAG, image_turn=True),
    _LLAVA_LLAMA_2,
    replace(_LLAVA_LLAMA_2, name="mistral_instruct", system="", between="[INST] "),
    _MPT,
    _CHATML_DIRECT,
    Template(
        name="llava_llama_3",
        system=_HELPFUL,
        header=(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
        ),
        bare_header="<|begin_of_text|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",
        assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
        answer="{text}<|eot_id|>",
        stops=("<|eot_id|>",),
    ),
    Template(
        name="qwen_1_5",
        system="You are a helpful assistant.",
        header="<|im_start|>system\n{system}<|im_end|>\n",
        user="<|im_start|>user\n{text}<|im_end|>\n",
        assistant="<|im_start|>assistant\n",
        answer="{text}<|im_end|>\n",
        stops=("<|im_end|>",),
    ),
    Template(
        name="plain",
        system="",
        header="{system}",
        user="{text}",
        assistant="",
        answer="{text}\n",
        stops=("\n",),
        image_joint="",
    ),
)
_NAMED = {template.name: template for template in _ALL}
_ALIASES = {"v1": "vicuna_v1", "v0": "vicuna_v0", "mistral_direct": "chatml_direct"}
#: Every built-in template by name, LLaVA's short names included.
TEMPLATES: Mapping[str, Template] = _NAMED | {a: _NAMED[name] for a, name in _ALIASES.items()}


def get_template(name: str) -> Template:
    """A built-in template.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in TEMPLATES:
        raise ValueError(f"There is no template {name!r}; known: {', '.join(sorted(TEMPLATES))}.")
    return TEMPLATES[name]
