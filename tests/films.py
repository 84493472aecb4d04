"""Films of moving shapes, encoded here: what phones, browsers and screen recorders make."""

from __future__ import annotations

import io

import av
import numpy as np

SIZE = (64, 48)  # even, as 4:2:0 wants it


def drawn(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Frame `number`: a square that moves and changes its colour, on a gradient."""
    width, height = size
    frame = np.zeros((height, width, 3), np.uint8)
    frame[..., 2] = np.linspace(40, 90, width)
    left = 3 * number % (width - 16)
    frame[height // 3 : height // 3 + 12, left : left + 16] = (200, 20 * number % 256, 60)
    return frame


def film(
    codec: str = "libx264",
    container: str = "mp4",
    frames: int = 23,
    size: tuple[int, int] = SIZE,
    **options: str,
) -> bytes:
    """A film of so many frames at 10 a second; with B-frames where the codec has them.

    Its options are the encoder's.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=10, options=options)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.gop_size = 6
        for number in range(frames):
            picture = av.VideoFrame.from_ndarray(drawn(number, size), format="rgb24")
            output.mux(stream.encode(picture))
        output.mux(stream.encode())
    return file.getvalue()


def decoded(content: bytes) -> list[np.ndarray]:
    """Every frame, as transformers' own example reads it (`read_video_pyav`)."""
    with av.open(io.BytesIO(content)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
