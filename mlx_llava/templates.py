"""The original LLaVA's conversation templates by name (LLaVA and LLaVA-NeXT, conversation.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mlx_llava.prompt import Message, Template

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
_ALIASES = {"v1": "vicuna_v1", "v0": "vicuna_v0", "mistral_direct": "chatml_direct"}

#: Every built-in template by name, LLaVA's short names included.
TEMPLATES: Mapping[str, Template] = {
    **{template.name: template for template in _ALL},
    **{
        alias: template
        for alias, name in _ALIASES.items()
        for template in _ALL
        if template.name == name
    },
}


def get_template(name: str) -> Template:
    """A built-in template.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in TEMPLATES:
        raise ValueError(f"There is no template {name!r}; known: {', '.join(sorted(TEMPLATES))}.")
    return TEMPLATES[name]
