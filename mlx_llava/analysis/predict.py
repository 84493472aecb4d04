"""How fast a checkpoint should be: a calculation from its shapes and a machine's rates.

Of the checkpoint only its config, its tokenizer and what its files say of their tensors are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from PIL import Image

from mlx_llava.analysis.flops import Work, work_of
from mlx_llava.analysis.machine import layer_rate, layer_read_rate
from mlx_llava.checkpoint.download import fitting_model
from mlx_llava.checkpoint.hub import Source, checkpoint_name, find_checkpoint
from mlx_llava.checkpoint.load import empty_model, make_processor
from mlx_llava.checkpoint.open import Checkpoint, open_checkpoint
from mlx_llava.checkpoint.precision import arrays_of, suit_device
from mlx_llava.inputs.inputs import Inputs
from mlx_llava.model.device import check_weights, on_cpu
from mlx_llava.model.llava import Llava

PROMPT = "USER: <image>\nWhat is in this picture? ASSISTANT:"
PICTURE = (640, 480)
ANSWER = 32


@dataclass(frozen=True)
class Machine:
    """What a machine reaches.

    Attributes:
        encode: operations a second of the vision tower.
        prefill: operations a second of the decoder.
        read: bytes a second of weights, for one token.
        kernel: seconds that each kernel takes beside that.
    """

    encode: float
    prefill: float
    read: float
    kernel: float

    def expect(self, work: Work) -> dict[str, float]:
        """The seconds to the first token and for each after it, and how many a second that is."""
        kernels = work.encode_kernels + work.decoder_kernels
        first = work.encode / self.encode + work.prefill / self.prefill + kernels * self.kernel
        token = work.token / self.read + work.decoder_kernels * self.kernel
        return {"first_token": first, "token": token, "tokens_per_second": 1 / token}


#: What matmuls take of the time of CLIP and of a prompt; the rest are softmax, norms and gates
#: (scripts/profile_layers.py).
ENCODE_SHARE, PREFILL_SHARE = 0.8, 0.88
#: Seconds that a kernel of one row takes to be made and launched.
CPU_KERNEL, GPU_KERNEL = 25e-6, 4e-6
#: What MLX reaches of the TFLOPS and the bandwidth of Macs: with Qwen3-4B in 4 bits, mlx-lm reads
#: prompts at 75-83 % of an M3 Pro's TFLOPS; and with `GPU_KERNEL` this bandwidth gives its tokens
#: on an M3 Pro and an M4 Max within 10 % (docs/benchmarks.md).
MAC_FLOPS, MAC_BANDWIDTH = 0.75, 0.8
#: TFLOPS of a GPU's core: Apple's 2.6 for the 8 of M1 and 3.6 for the 10 of M2; of others 256
#: operations a cycle. In M5's matmuls Apple's "over 4x" of M4's.
_CORE = {"M1": 2.6 / 8, "M2": 3.6 / 10, "M3": 0.358, "M4": 0.404, "M5": 4 * 0.404}
#: What Apple announced of the largest version of each chip: GB/s of memory, cores of the GPU.
CHIPS = {
    "M1": (68, 8),
    "M1 Pro": (200, 16),
    "M1 Max": (400, 32),
    "M1 Ultra": (800, 64),
    "M2": (100, 10),
    "M2 Pro": (200, 19),
    "M2 Max": (400, 38),
    "M2 Ultra": (800, 76),
    "M3": (100, 10),
    "M3 Pro": (150, 18),
    "M3 Max": (400, 40),
    "M3 Ultra": (819, 80),
    "M4": (120, 10),
    "M4 Pro": (273, 20),
    "M4 Max": (546, 40),
    "M5": (153, 10),
    "M5 Pro": (307, 20),
    "M5 Max": (614, 40),
}


def mac(chip: str) -> Machine:
    """What to expect of one of `CHIPS`."""
    gigabytes, cores = CHIPS[chip]
    flops = MAC_FLOPS * 1e12 * cores * _CORE[chip.split()[0]]
    return Machine(flops, flops, MAC_BANDWIDTH * 1e9 * gigabytes, GPU_KERNEL)


def this_machine(model: Llava, length: int) -> Machine:
    """What this machine reaches in layers like a model's, with random weights.

    Args:
        model (Llava): Its layers say what they compute in; their weights are not used.
        length (int): Of a prompt.
    """
    decoder = model.language_model.layers[0].mlp.up_proj
    tower = model.vision_tower.vision_model.encoder.layers[0].mlp.fc1
    tokens = model.config.vision_config.num_positions
    return Machine(
        ENCODE_SHARE * layer_rate(tower, tokens),
        PREFILL_SHARE * layer_rate(decoder, length),
        layer_read_rate(decoder),
        CPU_KERNEL if on_cpu() else GPU_KERNEL,
    )


def expect_here(model: Llava, inputs: Inputs, max_tokens: int = ANSWER) -> dict[str, float]:
    """What to expect of a model on this machine, in the form that its layers have."""
    work = work_of(model, inputs, max_tokens)
    speed = this_machine(model, inputs.input_ids.shape[1]).expect(work)
    speed["first_token"] += inputs.seconds
    return {**speed, "token_gb": work.token / 1e9}


def _nbytes(model: Llava) -> int:
    return sum(array.nbytes for array in arrays_of(model))


def _outline(checkpoint: Checkpoint) -> Llava:
    """The model of a checkpoint with zeros in the place of its weights, never computed."""
    model, tensors = empty_model(checkpoint), checkpoint.contents.tensors
    model.load_weights([(name, mx.zeros(t.shape, t.dtype)) for name, t in tensors.items()])
    return model


def outlined(source: Source) -> tuple[Llava, Inputs]:
    """A checkpoint's model as it is stored, never to be computed, and a question about a picture.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The checkpoint is broken or not supported.
    """
    checkpoint = open_checkpoint(source)
    inputs = make_processor(checkpoint)(PROMPT, Image.new("RGB", PICTURE), raw=True)
    return _outline(checkpoint), inputs


def predict(source: Source) -> dict[str, Any]:
    """The first token of a question about one picture, and the tokens after it, by calculation.

    Returns:
        What there is to do, what to expect ``here``, in the numbers that `load` would take, and
        on Macs with each of `CHIPS`, in those that are stored.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The checkpoint is broken or not supported.
    """
    model, inputs = outlined(source)
    stored = work_of(model, inputs, ANSWER)
    size = _nbytes(model)
    suit_device(model)
    try:
        is_quantized = model.config.quantization is not None
        check_weights(_nbytes(model), is_quantized, fitting_model())
    except ValueError as error:
        here: dict[str, Any] = {"refused": str(error)}
    else:
        here = {**expect_here(model, inputs)}
    return {
        "model": checkpoint_name(find_checkpoint(source.model, source.revision, source.offline)),
        "prompt_tokens": inputs.input_ids.shape[1],
        "weights_gb": size / 1e9,
        "encode_tflop": stored.encode / 1e12,
        "prefill_tflop": stored.prefill / 1e12,
        "token_gb": stored.token / 1e9,
        "here": here,
        "macs": {chip: mac(chip).expect(stored) for chip in CHIPS},
    }
