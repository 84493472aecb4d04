"""Draw the diagrams of docs/ as SVG.

python scripts/draw_diagrams.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from xml.sax.saxutils import escape

from mlx_llava.inputs.image_processor import Box, ImageProcessor
from mlx_llava.model.config import LlavaConfig

DOCS = Path(__file__).parent.parent / "docs"
PACKAGE = DOCS.parent / "mlx_llava"
#: Files at the top of the package that are no commands.
GROUND = ("files", "folders", "json_files", "signatures", "version")
INSIDE = ("__init__", "__main__", "arguments", "cli", "launched", "llm_plugin")
# Tints that stay apart for colour-blind readers, being of different lightness too.
SEEN, PROJECTED, WORD, DECODER, INK = "#dbeafe", "#fbcf8b", "#f1f1f1", "#cfe3c4", "#444444"


class Drawing:
    """An SVG that grows."""

    def __init__(self, width: int, height: int, title: str) -> None:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            'font-family="Helvetica, Arial, sans-serif" font-size="14" role="img" '
            f'aria-label="{escape(title)}">'
        )
        arrow = (
            '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
            f'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>'
        )
        self.parts = [head, '<rect width="100%" height="100%" fill="#ffffff"/>', arrow]

    def rect(self, x: float, y: float, w: float, h: float, fill: str, more: str = "") -> None:
        """A rectangle; `more` are other attributes."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" '
            f'stroke="{INK}" {more}/>'
        )

    def text(self, x: float, y: float, text: str, size: int = 12, more: str = "") -> None:
        """A line of text around x."""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="middle" font-size="{size}" {more}>'
            f"{escape(text)}</text>"
        )

    def box(self, x: float, y: float, w: float, title: str, below: str, fill: str) -> None:
        """A part of the model: its name and what is to say of it."""
        self.rect(x, y, w, 60, fill, 'rx="8"')
        self.text(x + w / 2, y + 27, title, 14, 'font-weight="bold"')
        self.text(x + w / 2, y + 46, below)

    def arrow(self, path: str) -> None:
        """A line with a head at its end; `path` as SVG writes it."""
        self.parts.append(
            f'<path d="{path}" stroke="{INK}" stroke-width="1.5" fill="none" marker-end="url(#a)"/>'
        )

    def photograph(self, x: float, y: float, w: float, h: float) -> None:
        """Mountains in the sun."""
        corners = ((0, 1), (0.33, 0.45), (0.58, 0.8), (0.73, 0.6), (1, 1))
        points = " ".join(f"{x + u * w:g},{y + v * h:g}" for u, v in corners)
        self.rect(x, y, w, h, "#cfe8ff")
        self.parts.append(
            f'<circle cx="{x + 0.76 * w:g}" cy="{y + 0.28 * h:g}" r="{h / 7:g}" fill="#ffcc33"/>'
            f'<polygon points="{points}" fill="#6aa84f"/>'
        )

    def tokens(
        self, x: float, y: float, words: Sequence[str], patches: int, at: int
    ) -> list[float]:
        """A row of words, with patches before the one at `at`; returns each one's middle."""
        middles = []
        for word in [*words[:at], *[""] * patches, *words[at:]]:
            width = 20 if not word else 18 + 7.4 * len(word)
            self.rect(x, y, width, 30, WORD if word else PROJECTED, 'rx="3"')
            self.text(x + width / 2, y + 20, word, 13)
            middles.append(x + width / 2)
            x += width + 6
        return middles

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def llava() -> Drawing:
    """The five statements."""
    drawing = Drawing(
        960,
        250,
        "A picture goes through the CLIP encoder and the projector; its features stand among the "
        "words of the prompt; the decoder answers.",
    )
    drawing.photograph(20, 30, 90, 70)
    drawing.text(65, 118, "picture")
    drawing.box(160, 35, 170, "CLIP encoder", "576 patches of 14 x 14", SEEN)
    drawing.box(390, 35, 150, "projector", "two layers", PROJECTED)
    for start, end in ((112, 156), (332, 386), (542, 596)):
        drawing.arrow(f"M{start} 65L{end} 65")
    drawing.tokens(602, 50, [], 4, 0)
    drawing.text(760, 70, "image features")
    drawing.text(40, 170, "prompt")
    words = ["USER:", "What", "is", "this?", "ASSISTANT:"]
    middles = drawing.tokens(80, 150, words, 4, 1)
    drawing.arrow(f"M654 84C654 125 {middles[2] + 13:g} 105 {middles[2] + 13:g} 146")
    drawing.box(590, 135, 150, "decoder", "Vicuna, LLaMA, Mistral", DECODER)
    drawing.arrow(f"M{middles[-1] + 52:g} 165L586 165")
    drawing.arrow("M742 165L786 165")
    drawing.rect(792, 145, 150, 40, "#ffffff", 'rx="8"')
    drawing.text(867, 170, "A mountain in the sun.", 13)
    steps = "embed the text, encode the picture, project, replace the placeholders, decode"
    drawing.text(480, 232, steps, 13)
    return drawing


def image_modes() -> Drawing:
    """What of a picture of 640 x 400 each mode shows, by the processor's own reckoning."""
    drawing = Drawing(
        960,
        300,
        "Crop shows the middle square, pad a square with borders, anyres the whole and tiles.",
    )
    width, height, scale = 640, 400, 0.36
    config = LlavaConfig.from_dict({"model_type": "llava"})
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    tiled = LlavaConfig.from_dict({"model_type": "llava_next", "image_grid_pinpoints": pinpoints})
    modes = (
        ("crop", config, "crop: llava-hf's 1.5", "none"),
        ("pad", config, "pad: the original 1.5", "#7a7468"),  # the mean colour
        ("anyres", tiled, "anyres: 1.6", "#000000"),
    )
    for column, (mode, of, title, border) in enumerate(modes):
        x, y = 40 + 310 * column, 80
        processor = ImageProcessor(of, mode, of.vision_config.image_size)
        boxes = processor.tile_boxes((height, width))
        for box in boxes:
            frame(drawing, box, x, y, scale, border)
        drawing.photograph(x, y, width * scale, height * scale)
        for box in boxes:
            frame(drawing, box, x, y, scale, "none")
        count = processor.num_tokens((height, width))
        tiles = (
            f"{len(boxes)} tiles: the whole, and {len(boxes) - 1}" if len(boxes) > 1 else "1 tile"
        )
        drawing.text(x + width * scale / 2, 24, title, 15, 'font-weight="bold"')
        drawing.text(x + width * scale / 2, 290, f"{tiles}; {count} tokens", 13)
    return drawing


def frame(drawing: Drawing, box: Box, x: float, y: float, scale: float, fill: str) -> None:
    """A tile of a picture that lies at (x, y)."""
    left, top, right, bottom = (edge * scale for edge in box)
    drawing.rect(x + left, y + top, right - left, bottom - top, fill, 'stroke-width="2.5"')


def sequence() -> Drawing:
    """Prefill, then token by token."""
    drawing = Drawing(
        960,
        260,
        "Prefill reads the prompt at once; then each token is read and gives the next one.",
    )
    drawing.text(70, 50, "prefill", 14, 'font-weight="bold"')
    words = ["<s>", "USER:", "What", "is", "this?", "ASSISTANT:"]
    middles = drawing.tokens(130, 30, words, 5, 2)
    end = middles[-1]
    drawing.rect(130, 90, end + 50 - 130, 34, DECODER, 'rx="8"')
    drawing.text((130 + end) / 2, 112, "keys and values of all of them stay in the cache", 13)
    for middle in middles:
        drawing.arrow(f"M{middle:g} 62L{middle:g} 86")
    drawing.text(70, 185, "decode", 14, 'font-weight="bold"')
    drawing.arrow(f"M{end:g} 126L{end:g} 161")
    x = end - 13
    for word in ("A", "mountain", "in", "the"):
        width = 18 + 7.4 * len(word)
        drawing.rect(x, 165, width, 30, "#ffffff", 'rx="3"')
        drawing.text(x + width / 2, 185, word, 13)
        drawing.arrow(f"M{x + width + 2:g} 180L{x + width + 30:g} 180")
        x += width + 34
    note = "each step reads one token, and looks back at the picture and at all that was said"
    drawing.text(480, 240, note, 13)
    return drawing


#: The rooms from top to bottom, and what each makes of what.
ROOMS = (
    (("commands", "what one can type"),),
    (
        ("tuner", "samples -> weights"),
        ("serving", "text over HTTP"),
        ("analysis", "what a model did"),
        ("captioning", "texts -> files"),
    ),
    (("generation", "inputs -> text"),),
    (("checkpoint", "files <-> a model"),),
    (("inputs", "what a user has -> inputs"),),
    (("model", "arrays -> arrays"),),
)
FLOORS = (WORD, SEEN, DECODER, DECODER, PROJECTED, PROJECTED)


def rooms() -> Drawing:
    """The package: each room imports only rooms below it, and rooms on one floor never meet."""
    drawing = Drawing(
        960, 540, "Rooms, one above the other; each imports only from those below it."
    )
    y = 12
    for names, fill in zip(ROOMS, FLOORS, strict=True):
        width = (920 - 20 * (len(names) - 1)) / len(names)
        files = [wrap(" ".join(_files(name)), int(width / 6.2)) for name, _ in names]
        height = 50 + 14 * max(map(len, files))
        for column, (name, job) in enumerate(names):
            x = 20 + column * (width + 20)
            drawing.rect(x, y, width, height, fill, 'rx="8"')
            title = name if name == "commands" else f"{name}/"
            drawing.text(x + width / 2, y + 20, title, 15, 'font-weight="bold"')
            drawing.text(x + width / 2, y + 38, job, 12)
            for row, line in enumerate(files[column]):
                drawing.text(x + width / 2, y + 55 + 14 * row, line, 11)
        y += height + 10
    drawing.text(480, y + 10, "the ground: " + ", ".join(GROUND), 12)
    return drawing


def _files(room: str) -> list[str]:
    """The files of a room."""
    folder = PACKAGE if room == "commands" else PACKAGE / room
    others = {*GROUND, *INSIDE} if room == "commands" else {"__init__"}
    return sorted({path.stem for path in folder.glob("*.py")} - others)


DIAGRAMS = {"llava": llava, "image-modes": image_modes, "sequence": sequence, "rooms": rooms}


if __name__ == "__main__":
    for name, draw in DIAGRAMS.items():
        (DOCS / f"{name}.svg").write_text(str(draw()), encoding="utf-8")
