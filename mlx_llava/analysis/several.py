"""What to expect of a model on several equal machines, from what one of them reaches.

L tokens of the prompt, D width; n ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_llava.analysis.flops import Work, work_of
from mlx_llava.analysis.machine import clock
from mlx_llava.analysis.predict import ANSWER, Machine, outlined, this_machine
from mlx_llava.checkpoint.hub import Source
from mlx_llava.checkpoint.precision import arrays_of, suit_device
from mlx_llava.model.device import total_memory
from mlx_llava.model.llava import Llava
from mlx_llava.model.pipeline import CHUNK
from mlx_llava.model.ranks import Ranks

#: The bytes of an all_sum by which latency and rate are measured, and how often each is.
SHORT, LONG = 4096, 16 << 20
_REPEATS = {SHORT: 50, LONG: 5}
#: Of a decoder of 32 layers.
SUMS_OF_7B = 64
HOW = ("tensor parallel", "pipeline")


@dataclass(frozen=True)
class Wire:
    """What is between the ranks.

    Attributes:
        latency: seconds that a sum over all ranks takes, however short.
        rate: bytes of it a second beside that.
    """

    latency: float
    rate: float

    def seconds(self, nbytes: float) -> float:
        """How long it takes for all ranks to add up so much."""
        return self.latency + nbytes / self.rate


def measure(ranks: Ranks) -> Wire:
    """Measures it, with all ranks at the same time."""
    least = {}
    for size, repeats in _REPEATS.items():
        array = mx.zeros((size // 4,))
        mx.eval(array)

        def add(array: mx.array = array) -> None:
            with ranks.working():
                mx.eval(mx.distributed.all_sum(array, group=ranks.group, stream=ranks.stream))

        least[size] = min(clock(add) for _ in range(repeats))
    latency = least[SHORT]
    return Wire(latency, LONG / max(least[LONG] - latency, 1e-9))


@dataclass(frozen=True)
class Load:
    """What one prompt with images takes of a model.

    Attributes:
        encode: operations of the vision tower, and
        tiles: of how many tiles.
        prefill: operations of the decoder.
        token: bytes that a token reads, and
        whole: how many of these every rank reads.
        kernels: of one pass through the decoder.
        layers: of the decoder.
        state: bytes of a hidden state.
        length: tokens of the prompt.
        weights: bytes of all weights, and
        kept: how many of these every rank has.
    """

    encode: float
    tiles: int
    prefill: float
    token: float
    whole: float
    kernels: int
    layers: int
    state: int
    length: int
    weights: int
    kept: int

    @classmethod
    def of(cls, model: Llava, work: Work, length: int, tiles: int) -> Load:
        """That of a whole model."""
        decoder = model.language_model
        text, weights = model.config.text_config, _nbytes(model)
        head = decoder.lm_head if "lm_head" in decoder else decoder.model.embed_tokens
        return cls(
            encode=work.encode,
            tiles=tiles,
            prefill=work.prefill,
            token=work.token,
            whole=_nbytes(head),
            kernels=work.decoder_kernels,
            layers=text.num_hidden_layers,
            state=text.hidden_size * decoder.dtype.size,
            length=length,
            weights=weights,
            kept=weights - sum(map(_nbytes, decoder.layers)),
        )

    def expect(self, machine: Machine, wire: Wire, n: int) -> dict[str, dict[str, float]]:
        """Seconds to the first token, tokens a second and GB a rank, by how the ranks share."""
        tiles = -(-self.tiles // n) / max(1, self.tiles)
        encode = self.encode * tiles / machine.encode
        prefill, kernels = self.prefill / machine.prefill, self.kernels * machine.kernel
        sums, hops = (2 * self.layers, n) if n > 1 else (0, 0)
        token = self.whole + (self.token - self.whole) / n
        shared = {
            "first_token": encode + prefill / n + sums * wire.seconds(self.length * self.state),
            "token": token / machine.read + kernels + sums * wire.seconds(self.state),
        }
        chunks = -(-self.length // CHUNK)
        chunk = wire.seconds(min(self.length, CHUNK) * self.state)
        piped = {
            "first_token": encode + prefill * (n + chunks - 1) / (n * chunks) + hops * chunk,
            "token": self.token / machine.read + kernels + hops * wire.seconds(self.state),
        }
        gigabytes = (self.kept + (self.weights - self.kept) / n) / 1e9
        return {
            how: {
                "first_token": one["first_token"] + kernels,
                "tokens_per_second": 1 / one["token"],
                "weights_gb": gigabytes,
            }
            for how, one in zip(HOW, (shared, piped), strict=True)
        }


def _nbytes(module: nn.Module) -> int:
    return sum(array.nbytes for array in arrays_of(module))


def foresee(source: Source, wire: Wire, size: int) -> list[dict[str, Any]]:
    """What to expect of a checkpoint on 1, 2, ... `size` machines like this one.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The checkpoint is broken or not supported.
    """
    model, inputs = outlined(source)
    suit_device(model)
    length = inputs.input_ids.shape[1]
    load = Load.of(model, work_of(model, inputs, ANSWER), length, sum(inputs.image_tiles))
    machine = this_machine(model, length)
    return [
        {"ranks": n, "how": how, **expected, "fits": expected["weights_gb"] < total_memory() / 1e9}
        for n in range(1, size + 1)
        for how, expected in load.expect(machine, wire, n).items()
    ]


def advise(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which of what `foresee` says to take."""
    fitting = [row for row in rows if row["fits"]]
    if not fitting:
        return f"The weights do not fit {rows[-1]['ranks']} ranks; take more, or fewer bits."
    best = max(fitting, key=lambda row: row["tokens_per_second"])
    if best["ranks"] == 1:
        return "One machine alone is fastest; for more questions, one server on each of them."
    flag = " (--pipeline)" if best["how"] == HOW[1] else ""
    return f"Best: {best['ranks']} ranks, {best['how']}{flag}."


def report(wire: Wire, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """All of it for people."""
    yield (
        f"an all_sum of {SHORT >> 10} KB takes {wire.latency * 1e6:.0f} us, of {LONG >> 20} MB "
        f"{wire.seconds(LONG) * 1e3:.1f} ms, {wire.rate / 1e9:.2f} GB/s"
    )
    a_token = SUMS_OF_7B * wire.latency * 1e3
    yield f"a 7B, tensor parallel, has {SUMS_OF_7B} of them a token: {a_token:.1f} ms"
    if not rows:
        return
    yield "ranks  how               first token  tokens/s  weights a rank"
    for row in rows:
        if row["ranks"] == 1 and row["how"] != HOW[0]:
            continue
        how = "alone" if row["ranks"] == 1 else row["how"]
        yield (
            f"{row['ranks']:5}  {how:<16}  {row['first_token']:9.2f} s  "
            f"{row['tokens_per_second']:8.1f}  {row['weights_gb']:11.2f} GB"
        )
    yield advise(rows)
