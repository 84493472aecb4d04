"""LLaVA's templates by name (conversation.py of LLaVA, LLaVA-NeXT, LLaVA++), and which to take."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from mlx_llava.inputs.chat_template import ChatTemplate, JinjaTemplate, Segment
from mlx_llava.inputs.messages import Message, check_turns
from mlx_llava.inputs.tokenizer import IMAGE_TOKEN, Tokenizer, token_text
from mlx_llava.model.config import LlavaConfig

_LLAMA_3_WORDS = 128256
_YI_WORDS = range(64000, 64065)  # with a placeholder, up to a multiple of 64
_V0_WORDS = 32004  # 13b-delta-v0 and 7b-delta-v0 have a [PAD] beside the three image tokens
_VICUNA_WIDTHS = (4096, 5120)
_PHI_3_MINI = (3072, 8192, 32064)


@dataclass(frozen=True)
class Template(ChatTemplate):
    """A built-in template, as the segments that it puts around what is said."""

    name: str
    system: str  # unless the user gives one
    header: str  # opens the prompt, around {system}
    user: str  # a question, around {text}
    assistant: str  # announces an answer
    answer: str  # a past one, around {text}
    stops: tuple[str, ...]
    bare_header: str = ""  # opens the prompt when the system text is empty
    between: str = ""  # an answer and the next question
    image_joint: str = "\n"
    examples: tuple[Message, ...] = ()  # turns that precede the conversation
    image_turn: bool = False  # images get a turn of their own, acknowledged with "Received."

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """Writes the conversation; see `ChatTemplate`."""
        check_turns(messages)
        system = self.system
        if messages[0].role == "system":
            system, messages = messages[0].text, messages[1:]
        header = self.header.replace("{system}", system) if system else self.bare_header
        segments = [Segment(header)]
        turns = [*self.examples, *self._images_first(messages)]
        inserted = len(turns) - len(messages)
        mark = next(stop for stop in self.stops if stop in self.answer)
        answer, after = self.answer.rsplit(mark, 1)
        for i, message in enumerate(turns):
            if message.role == "assistant":
                said = answer.replace("{text}", message.text)
                segments += [
                    Segment(said + mark, i >= inserted and message.learned),
                    Segment(after),
                ]
                continue
            said = self.images_first(message)
            between = self.between if i else ""
            segments.append(Segment(between + self.user.replace("{text}", said) + self.assistant))
        return segments

    def _images_first(self, messages: Sequence[Message]) -> list[Message]:
        """Moves the first turn's images to a turn of their own (mmtag templates)."""
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
_QWEN_1_5 = Template(
    name="qwen_1_5",
    system="You are a helpful assistant.",
    header="<|im_start|>system\n{system}<|im_end|>\n",
    user="<|im_start|>user\n{text}<|im_end|>\n",
    assistant="<|im_start|>assistant\n",
    answer="{text}<|im_end|>\n",
    stops=("<|im_end|>",),
)

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
    _QWEN_1_5,
    replace(
        _QWEN_1_5,
        name="qwen_2_5",
        system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    Template(
        name="phi3_instruct",
        system="You are a helpful AI assistant.",
        header="<|system|>\n{system}<|end|>\n",
        user="<|user|>\n{text}<|end|>\n",
        assistant="<|assistant|>\n",
        answer="{text}<|end|>\n",
        stops=("<|end|>",),
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
_OTHER_NAMES = {
    "vicuna_v1": "v1",
    "vicuna_v0": "v0",
    "chatml_direct": "mistral_direct",
    "qwen_1_5": "qwen_2",
}
#: Every built-in template by name, LLaVA's other names included.
TEMPLATES: Mapping[str, Template] = {
    name: template
    for template in _ALL
    for name in (template.name, _OTHER_NAMES.get(template.name))
    if name
}


def get_template(name: str) -> Template:
    """A built-in template.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in TEMPLATES:
        raise ValueError(f"There is no template {name!r}; known: {', '.join(sorted(TEMPLATES))}.")
    return TEMPLATES[name]


class Guess(NamedTuple):
    """The name of a built-in template, and why another may be right; "" where none can."""

    name: str
    doubt: str = ""


def guess_template(config: LlavaConfig, name: str = "") -> Guess:
    """The template that a checkpoint was trained with, where none of its files says so.

    The original guesses from the folder's name alone (LLaVA, cli.py, lines 34 to 45), which a copy
    or the hub's cache loses. Here the numbers of the published checkpoints count too.

    Args:
        config: Its vocabulary without rows that were added for the placeholder.
        name: All names that the checkpoint and its base are known by.
    """
    text, name = config.text_config, name.lower()
    is_linear = config.mm_projector_type == "linear"
    has_mistral_sizes = (text.kv_heads, text.intermediate_size) == (8, 14336)
    if re.search(r"llama[-_]?2(?!\d)", name):
        return Guess("llava_llama_2")
    if config.mm_use_im_start_end:
        return Guess("llava_v0" if text.vocab_size == _V0_WORDS else "llava_v1")
    if text.model_type == "qwen2":
        return Guess("qwen_2_5" if re.search(r"qwen[-_]?2[-_.]?5", name) else "qwen_1_5")
    if (text.hidden_size, text.intermediate_size, text.vocab_size) == _PHI_3_MINI:
        return Guess("phi3_instruct", "LLaVA++'s; xtuner's has no system text")
    if text.vocab_size >= _LLAMA_3_WORDS:
        return Guess("llava_llama_3")
    if text.hidden_size == 7168 or text.vocab_size in _YI_WORDS:
        return Guess("chatml_direct")
    if text.model_type == "mistral" or has_mistral_sizes:
        if text.rope_theta == 1e6 or re.search("mistral.*instruct", name):
            return Guess("mistral_instruct")
        return Guess("vicuna_v1", "BakLLaVA's, on Mistral v0.1; its Instruct has mistral_instruct")
    if is_linear and text.max_position_embeddings >= 4096:
        return Guess("llava_llama_2", "LLaMA 2 with one linear layer; a Vicuna has vicuna_v1")
    if text.hidden_size in _VICUNA_WIDTHS and text.rope_theta == 1e4:
        return Guess("vicuna_v1")
    return Guess("vicuna_v1", "no published LLaVA has this shape")


def choose_template(config: LlavaConfig, tokenizer: Tokenizer) -> ChatTemplate:
    """The checkpoint's own template, or the one that its shape points to."""
    if config.conv_mode or not tokenizer.chat_template:
        return get_template(config.conv_mode or guess_template(config).name)
    named = {key: value for key, value in tokenizer.config.items() if key.endswith("_token")}
    tokens = {key: text for key, value in named.items() if (text := token_text(value))}
    template = JinjaTemplate(tokenizer.chat_template, tokens)
    return replace(template, stops=template.find_ends(tokenizer.special_tokens))
