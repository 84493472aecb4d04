"""Checks on the content of config files: what is not understood is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NoReturn, TypeVar

#: Keys that say nothing about the forward pass: provenance, training, generation defaults.
HARMLESS = frozenset(
    """
    architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward
    decoder_start_token_id diversity_penalty do_sample dropout dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label ignore_index
    image_seq_length initializer_factor initializer_range is_composition is_decoder
    label2id length_penalty logit_scale_init_value max_length max_sequence_length
    min_length model_type no_repeat_ngram_size num_additional_image_tokens num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores
    pad_token_id prefix pretraining_tp problem_type processor_class projection_dim
    quantization_config remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p unsloth_version use_bfloat16 use_cache use_return_dict
    vocab_size
    """.split()
)

Config = TypeVar("Config")


def refuse_unknown(data: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    """Raises ValueError for keys outside `known`, unless they are off or begin with ``_``."""
    unknown = [
        key
        for key, value in data.items()
        if key not in known
        and not key.startswith("_")
        and not (value is None or value is False or value in ([], {}))
    ]
    if unknown:
        raise ValueError(
            f"{where} has keys that mlx_llava does not know and that could change the result: "
            f"{', '.join(f'{key}={data[key]!r}' for key in sorted(unknown))}. "
            "Remove those that do not matter for this model."
        )


def refuse_value(where: str, key: str, found: object, expected: object) -> NoReturn:
    """Raises ValueError for a value, with what is supported instead."""
    raise ValueError(f"{where} has {key}={found!r}; mlx_llava supports {expected}.")


def build(cls: type[Config], data: Mapping[str, Any], where: str) -> Config:
    """Makes a config of the keys that it has; null stands for a default that is not null."""
    values = {}
    for field in fields(cls):  # type: ignore[arg-type]
        value, default = data.get(field.name), field.default
        if field.name not in data or (value is None and default is not None):
            continue
        kinds = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}.get(type(default))
        if kinds and not isinstance(value, (*kinds, tuple)):
            refuse_value(where, field.name, value, f"a {type(default).__name__}")
        values[field.name] = value
    return cls(**values)


def refuse_empty(config: object, where: str) -> None:
    """Raises ValueError for a size that is not positive."""
    for key, value in vars(config).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
            refuse_value(where, key, value, "positive numbers")
