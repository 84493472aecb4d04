"""Kinds of pictures that are no drawings of coloured shapes: a function each, from chance alone.

Textures, gradients and noise, text, charts and screens, and what has the colours, the light and the
spectra of photographs.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import shapes
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE = shapes.SIDE

Chance: TypeAlias = np.random.Generator
Plane: TypeAlias = "npt.NDArray[np.float64]"
Colour: TypeAlias = tuple[int, int, int]

#: Sky, water, leaves, grass, earth, sand, wood, skin, stone, night, snow, brick.
NATURAL = np.array(
    [
        (135, 175, 220), (60, 100, 130), (60, 90, 40), (120, 145, 70),
        (100, 75, 50), (205, 185, 145), (150, 105, 65), (215, 165, 135),
        (130, 128, 122), (25, 28, 40), (235, 238, 242), (150, 70, 55),
    ]
)  # fmt: skip


def _natural(chance: Chance) -> Colour:
    """A colour of what is seen outside and in rooms, in any light."""
    colour = NATURAL[chance.integers(len(NATURAL))] * chance.uniform(0.5, 1.2)
    return _rgb(colour + chance.normal(0, 18, 3))


def _pale(chance: Chance) -> Colour:
    """Bright and nearly grey, as overcast skies, walls and paper."""
    return _rgb(chance.uniform(205, 256) + chance.normal(0, 7, 3))


def _any(chance: Chance) -> Colour:
    return _rgb(chance.uniform(0, 256, 3))


def _rgb(values: npt.ArrayLike) -> Colour:
    red, green, blue = (int(v) for v in np.clip(np.asarray(values), 0, 255))
    return red, green, blue


def _image(pixels: Plane) -> Image.Image:
    """A picture from values of 0 to 1, (S, S) or (S, S, 3)."""
    pixels = pixels if pixels.ndim == 3 else pixels[..., None].repeat(3, axis=-1)
    return Image.fromarray((255 * np.clip(pixels, 0, 1)).astype(np.uint8))


def _spectrum(chance: Chance, slope: float) -> Plane:
    """Noise whose amplitude falls as 1 / frequency ** slope, from 0 to 1."""
    row, column = np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None]
    amplitude = np.maximum(np.hypot(row, column), 1 / SIDE) ** -slope
    phase = np.exp(2j * np.pi * chance.random(amplitude.shape))
    plane = np.fft.irfft2(amplitude * phase, (SIDE, SIDE))
    return (plane - plane.min()) / np.ptp(plane)


def _ramp(chance: Chance, plane: Plane, colour: Callable[[Chance], Colour]) -> Plane:
    """Values of 0 to 1 in two to four colours."""
    stops = np.array([colour(chance) for _ in range(chance.integers(2, 5))]) / 255
    at = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(plane, at, stops[:, i]) for i in range(3)], axis=-1)


def _grid() -> tuple[Plane, Plane]:
    y, x = np.mgrid[:SIDE, :SIDE] / (SIDE - 1)
    return x, y


def _slope(chance: Chance) -> Plane:
    """From 0 to 1 across the picture, in any direction."""
    x, y = _grid()
    angle = chance.uniform(0, 2 * np.pi)
    plane = x * np.cos(angle) + y * np.sin(angle)
    return (plane - plane.min()) / np.ptp(plane)


def _seen(chance: Chance, picture: Image.Image) -> Image.Image:
    """A picture as a camera gives it: texture, uneven light, a little blur, grain."""
    pixels = np.asarray(picture) / 255.0
    texture = _spectrum(chance, chance.uniform(0.6, 1.4)) - 0.5
    light = 1 + chance.uniform(0, 0.7) * (_slope(chance) - 0.5)
    pixels = (pixels + chance.uniform(0.05, 0.5) * texture[..., None]) * light[..., None]
    blurred = _image(pixels).filter(
        ImageFilter.GaussianBlur(float(chance.choice((0, 0, 0.6, 1.2))))
    )
    grain = chance.normal(0, chance.uniform(0, 0.03), (SIDE, SIDE, 1))
    return _image(np.asarray(blurred) / 255.0 + grain)


def gradient(chance: Chance) -> Image.Image:
    """Colours that flow into each other, along a line or around a point."""
    x, y = _grid()
    u, v = chance.uniform(0, 1, 2)
    around = np.minimum(np.hypot(x - u, y - v) / chance.uniform(0.4, 1.2), 1)
    plane = _slope(chance) if chance.random() < 0.5 else around
    return _image(_ramp(chance, plane, _any if chance.random() < 0.5 else _natural))


def plain(chance: Chance) -> Image.Image:
    """Nearly one colour: a sky, a wall, a sheet with nothing on it."""
    colour = (_pale, _natural, _any)[chance.integers(3)](chance)
    uneven = chance.uniform(0, 0.12) * _slope(chance)
    uneven = uneven + chance.uniform(0, 0.12) * _spectrum(chance, chance.uniform(0.6, 2))
    grain = chance.normal(0, chance.uniform(0, 0.015), (SIDE, SIDE, 1))
    return _image(np.array(colour) / 255 + (uneven - uneven.mean())[..., None] + grain)


def noise(chance: Chance) -> Image.Image:
    """White noise at any scale, grey or in colours."""
    side = int(chance.choice((6, 12, 24, 48, 96)))
    bands = int(chance.choice((1, 3)))
    pixels = chance.random((side, side, bands)) ** chance.uniform(0.5, 2)
    if bands == 1:
        pixels = _ramp(chance, pixels[..., 0], _any)
    how = Image.Resampling(int(chance.choice((Image.Resampling.NEAREST, Image.Resampling.BICUBIC))))
    return _image(pixels).resize((SIDE, SIDE), how)


def fractal(chance: Chance) -> Image.Image:
    """Noise of all scales: pink, brown and between."""
    plane = _spectrum(chance, chance.uniform(0.5, 2.2))
    return _image(_ramp(chance, plane, _any if chance.random() < 0.4 else _natural))


def voronoi(chance: Chance) -> Image.Image:
    """Flat or shaded cells around points."""
    x, y = _grid()
    points = chance.random((int(chance.integers(8, 60)), 2))
    distances = np.hypot(x[..., None] - points[:, 0], y[..., None] - points[:, 1])
    colours = np.array([_any(chance) for _ in points]) / 255
    first, second = np.sort(distances, axis=-1)[..., :2].transpose(2, 0, 1)
    shade = np.clip((second - first) * chance.uniform(4, 40), 0, 1)
    return _image(colours[distances.argmin(axis=-1)] * shade[..., None])


def wood(chance: Chance) -> Image.Image:
    """Bent rings or veins, as of wood and marble."""
    x, y = _grid()
    bend = _spectrum(chance, chance.uniform(1.5, 2.2)) * chance.uniform(0.2, 1.2)
    around = np.hypot(x - chance.uniform(-1, 2), (y - 0.5) * chance.uniform(0.1, 1))
    plane = around if chance.random() < 0.5 else _slope(chance)
    waves = 0.5 + 0.5 * np.sin(2 * np.pi * chance.uniform(2, 12) * (plane + bend))
    return _image(_ramp(chance, waves, _natural))


def blobs(chance: Chance) -> Image.Image:
    """Soft spots."""
    picture = Image.new("RGB", (SIDE, SIDE), _any(chance))
    pen = ImageDraw.Draw(picture)
    for _ in range(chance.integers(4, 30)):
        pen.ellipse(_box(chance, 5, 45), fill=_any(chance))
    return picture.filter(ImageFilter.GaussianBlur(chance.uniform(1.5, 10)))


def _box(chance: Chance, least: float, most: float) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of something anywhere."""
    x, y = chance.uniform(-10, SIDE, 2)
    width, height = chance.uniform(least, most, 2)
    return x, y, x + width, y + height


def lines(chance: Chance) -> Image.Image:
    """Lines and polygons of any corners across each other, some textured."""
    picture = Image.new("RGB", (SIDE, SIDE), _any(chance))
    pen = ImageDraw.Draw(picture)
    for _ in range(chance.integers(5, 40)):
        count = int(chance.choice((2, 2, 3, 4, 5, 7)))
        corners = [(float(x), float(y)) for x, y in chance.uniform(-20, SIDE + 20, (count, 2))]
        if count == 2:
            pen.line(corners, fill=_any(chance), width=int(chance.integers(1, 7)))
        else:
            pen.polygon(corners, fill=_any(chance))
    return _seen(chance, picture) if chance.random() < 0.4 else picture


def text(chance: Chance) -> Image.Image:
    """A page of letters of one size, sometimes turned."""
    size = float(chance.uniform(7, 40))
    paper, ink = _paper(chance)
    picture = Image.new("RGB", (2 * SIDE, 2 * SIDE), paper)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    letters = list(string.ascii_letters + string.digits + "     .,")
    for y in np.arange(chance.uniform(0, size), 2 * SIDE, size * chance.uniform(1.1, 1.6)):
        line = "".join(chance.choice(letters, int(400 / size)))
        pen.text((chance.uniform(0, 6), y), line, fill=ink, font=font)
    turned = picture.rotate(float(chance.choice((0, 0, chance.uniform(-30, 30)))), fillcolor=paper)
    left, top = (int(v) for v in chance.integers(0, SIDE, 2))
    return turned.crop((left, top, left + SIDE, top + SIDE))


def _paper(chance: Chance) -> tuple[Colour, Colour]:
    """Dark on light, light on dark, or any two colours."""
    light, dark = _rgb(chance.uniform(200, 256, 3)), _rgb(chance.uniform(0, 90, 3))
    pairs = ((light, dark), ((255, 255, 255), (0, 0, 0)), (dark, light), (_any(chance), dark))
    return pairs[chance.choice(4, p=(0.3, 0.3, 0.2, 0.2))]


def chart(chance: Chance) -> Image.Image:
    """Bars, a curve or a pie with axes and labels, four times as large, made smaller."""
    side = 4 * SIDE
    paper, ink = _paper(chance)
    picture = Image.new("RGB", (side, side), paper)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(float(chance.uniform(20, 40)))
    count, base = int(chance.integers(3, 12)), side - 50
    heights = chance.uniform(20, side - 90, count)
    middles = np.linspace(80, side - 40, count)
    kind = chance.integers(3)
    if kind == 2:
        angles = np.append(np.sort(chance.uniform(0, 360, count)), 360.0)
        for start, end in zip(np.append(0.0, angles), angles, strict=False):
            pen.pieslice((60, 40, side - 40, side - 60), start, end, fill=_any(chance))
    for y in np.linspace(60, base, int(chance.integers(2, 7))):
        pen.line((50, y, side, y), fill=_rgb(np.add(paper, ink) / 2), width=3)
        pen.text((2, y - 12), str(chance.integers(1000)), fill=ink, font=font)
    pen.line((50, 0, 50, base, side, base), fill=ink, width=5)
    if kind == 0:
        for x, height in zip(middles, heights, strict=True):
            pen.rectangle((x - 12, base - height, x + 12, base), fill=_any(chance))
    if kind == 1:
        points = list(zip(middles.tolist(), (base - heights).tolist(), strict=True))
        pen.line(points, fill=_any(chance), width=8)
    pen.text((80, 5), "".join(chance.choice(list(string.ascii_letters), 14)), fill=ink, font=font)
    return picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def boxes(chance: Chance) -> Image.Image:
    """Panels, bars, buttons and lines of text, as on a screen."""
    paper, ink = _paper(chance)
    picture = Image.new("RGB", (2 * SIDE, 2 * SIDE), paper)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(float(chance.uniform(7, 14)))
    pen.rectangle((0, 0, 2 * SIDE, chance.uniform(8, 30)), fill=_any(chance))
    for _ in range(chance.integers(4, 16)):
        left, top, right, bottom = (2 * v for v in _box(chance, 8, 60))
        fill = chance.choice(np.array([paper, _any(chance)]))
        pen.rounded_rectangle((left, top, right, bottom), 4, fill=_rgb(fill), outline=ink)
        for y in np.arange(top + 3, bottom - 10, 14):
            word = "".join(chance.choice(list(string.ascii_lowercase + " "), 12))
            pen.text((left + 4, y), word, fill=ink, font=font)
    return picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def leaves(chance: Chance) -> Image.Image:
    """Things of all sizes before each other, in natural colours (the dead leaves model)."""
    picture = Image.new("RGB", (2 * SIDE, 2 * SIDE), _natural(chance))
    pen = ImageDraw.Draw(picture)
    palette = [_natural(chance) for _ in range(chance.integers(3, 9))]
    for _ in range(chance.integers(30, 160)):
        radius = min(8 / chance.random(), 90.0)  # as often at every scale
        x, y = chance.uniform(0, 2 * SIDE, 2)
        flat = radius * chance.uniform(0.4, 1)
        colour = np.array(palette[chance.integers(len(palette))]) + chance.normal(0, 14, 3)
        if chance.random() < 0.6:
            pen.ellipse((x - radius, y - flat, x + radius, y + flat), fill=_rgb(colour))
        else:
            angles = np.sort(chance.uniform(0, 2 * np.pi, int(chance.integers(3, 7))))
            corners = [(x + radius * np.cos(a), y + flat * np.sin(a)) for a in angles]
            pen.polygon(corners, fill=_rgb(colour))
    return _seen(chance, picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def landscape(chance: Chance) -> Image.Image:
    """A sky, and ridges one before the other."""
    _, y = _grid()
    sky = _pale if chance.random() < 0.5 else _natural
    pixels = _ramp(chance, 0.7 * y + 0.3 * _spectrum(chance, 1.8), sky)
    horizon = chance.uniform(0.15, 0.75)
    for _ in range(chance.integers(1, 5)):
        ridge = horizon + (_spectrum(chance, 1.6)[0] - 0.5) * chance.uniform(0.05, 0.6)
        ground = _ramp(chance, _spectrum(chance, chance.uniform(0.6, 1.5)), _natural)
        pixels = np.where((y > ridge[None])[..., None], ground, pixels)
        horizon += chance.uniform(0.05, 0.3)
    return _seen(chance, _image(pixels))


def portrait(chance: Chance) -> Image.Image:
    """A few round things in light from one side, before something blurred."""
    x, y = _grid()
    behind = blobs if chance.random() < 0.3 else leaves
    picture = behind(chance).filter(ImageFilter.GaussianBlur(chance.uniform(0, 5)))
    pixels = np.asarray(picture) / 255.0
    light = chance.normal(0, 1, 2)
    for _ in range(chance.integers(1, 6)):
        u, v, width, height = *chance.uniform(0.1, 0.9, 2), *chance.uniform(0.08, 0.5, 2)
        bent = 0.3 * (_spectrum(chance, 1.8) - 0.5)
        across, down = (x - u) / width + bent, (y - v) / height + bent
        inside = np.hypot(across, down) < 1
        shade = np.clip(0.75 + 0.35 * (across * light[0] + down * light[1]), 0.1, 1.3)
        skin = _ramp(chance, _spectrum(chance, chance.uniform(0.6, 1.6)), _natural)
        colour = 0.6 * np.array(_natural(chance)) / 255 + 0.4 * skin
        pixels = np.where(inside[..., None], colour * shade[..., None], pixels)
    return _seen(chance, _image(pixels))


def plaid(chance: Chance) -> Image.Image:
    """Stripes or squares in rows, as on cloth."""
    x, y = _grid()
    across, down = (np.sin(2 * np.pi * chance.uniform(2, 14) * axis) > 0 for axis in (x, y))
    planes = np.stack([across, across ^ down, (across * 1.0 + down) / 2])
    return _image(_ramp(chance, planes[chance.integers(3)], _any))


def scribble(chance: Chance) -> Image.Image:
    """Handwriting that nobody can read."""
    paper, ink = _paper(chance)
    picture = Image.new("RGB", (2 * SIDE, 2 * SIDE), paper)
    pen = ImageDraw.Draw(picture)
    for y in np.arange(20, 2 * SIDE, chance.uniform(22, 60)):
        steps = np.cumsum(chance.normal((4, 0), (4, 6), (60, 2)), axis=0)
        points = [(float(u), float(y + 8 * np.sin(v / 5))) for u, v in steps]
        pen.line(points, fill=ink, width=int(chance.integers(2, 6)), joint="curve")
    return picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def bokeh(chance: Chance) -> Image.Image:
    """Lights at night, out of focus."""
    pixels = np.asarray(_seen(chance, fractal(chance))) / 255.0 * chance.uniform(0.1, 0.5)
    x, y = _grid()
    for _ in range(chance.integers(5, 30)):
        u, v = chance.random(2)
        disc = np.hypot(x - u, y - v) < chance.uniform(0.02, 0.14)
        pixels = pixels + disc[..., None] * np.array(_any(chance)) / 255 * chance.uniform(0.3, 0.9)
    return _image(pixels).filter(ImageFilter.GaussianBlur(chance.uniform(0.5, 2)))
