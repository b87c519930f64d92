"""The picture of an explained image: what the network saw, the map over it, and what it shows in words."""

import textwrap
from functools import cache

import matplotlib
import numpy as np
from matplotlib import font_manager
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pylorus.data.image import RGB
from pylorus.deploy.explain import COLOURS, overlay
from pylorus.report.fonts import OWN, drawn_by_own, wider_font_file

SMALLEST, GAP, LINE, LETTERS = 336, 16, 20, 14
"""Pixels: least side of a square, space between things, height of a line, of a letter."""
INK, PAPER = (33, 33, 33), (255, 255, 255)


def picture(image: RGB, heat: NDArray[np.float64], lines: tuple[str, ...]) -> Image.Image:
    """The input, the map over it, a scale of colours and some lines of text.

    Args:
        image: uint8 RGB of shape (size, size, 3).
        heat: Of shape (size, size), in [0, 1].
        lines: What is said of it; long ones are broken.
    """
    side = max(SMALLEST, len(image))
    width = 2 * side + 3 * GAP
    # A letter is about half as wide as it is high; CJK ones are broken by their own width.
    broken = [part for line in lines for part in _broken(line, width - 2 * GAP)]
    page = Image.new("RGB", (width, side + 4 * GAP + LINE + LINE * len(broken)), PAPER)
    for place, content in enumerate((image, overlay(image, heat))):
        square = Image.fromarray(content).resize((side, side), Image.Resampling.BICUBIC)
        page.paste(square, (GAP + place * (side + GAP), GAP))
    draw = ImageDraw.Draw(page)
    below = side + 2 * GAP
    scale = np.tile(matplotlib.colormaps[COLOURS](np.linspace(0, 1, side // 2))[:, :3] * 255, (LINE // 2, 1, 1))
    left = 2 * GAP + side
    page.paste(Image.fromarray(scale.astype(np.uint8)), (left, below + LINE // 4))
    draw.text((left + side // 2 + GAP // 2, below), "0 to its maximum", INK, _font("0"))
    draw.text((GAP, below), "what the network saw", INK, _font("w"))
    for number, line in enumerate(broken):
        draw.text((GAP, below + LINE + GAP + number * LINE), line, INK, _font(line))
    return page


def _broken(line: str, width: int) -> list[str]:
    letters = int(width / max(_font(line).getlength(line) / max(len(line), 1), 1))
    return textwrap.wrap(line, max(20, letters - 3)) or [""]


def _font(words: str) -> ImageFont.FreeTypeFont:
    return _loaded(drawn_by_own(words))


@cache
def _loaded(own: bool) -> ImageFont.FreeTypeFont:
    wider = None if own else wider_font_file()
    return ImageFont.truetype(str(wider or font_manager.findfont(OWN)), LETTERS)
