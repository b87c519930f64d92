"""Draw an explained image: the network's input, the heat map over it, and a caption."""

import textwrap
from functools import cache

import matplotlib
import numpy as np
from matplotlib import font_manager
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pylorus.data.image import RGB
from pylorus.deploy.explain import COLOURS, render_overlay
from pylorus.report.fonts import OWN, find_cjk_font_file, is_in_default_font

SMALLEST, GAP, LINE, LETTERS = 336, 16, 20, 14
"""In pixels: minimum side of an image, gap between elements, line height, font size."""
INK, PAPER = (33, 33, 33), (255, 255, 255)


def draw_explanation(image: RGB, heat: NDArray[np.float64], lines: tuple[str, ...]) -> Image.Image:
    """Draw the input, the heat map over it, a color scale and lines of text.

    Args:
        image: uint8 RGB of shape (size, size, 3).
        heat: Heat map of shape (size, size), in [0, 1].
        lines: The caption; long lines are wrapped.
    """
    side = max(SMALLEST, len(image))
    width = 2 * side + 3 * GAP
    # Lines are wrapped by their measured width: CJK characters are wider than Latin ones.
    wrapped = [part for line in lines for part in _wrap_line(line, width - 2 * GAP)]
    page = Image.new("RGB", (width, side + 4 * GAP + LINE + LINE * len(wrapped)), PAPER)
    for column, content in enumerate((image, render_overlay(image, heat))):
        square = Image.fromarray(content).resize((side, side), Image.Resampling.BICUBIC)
        page.paste(square, (GAP + column * (side + GAP), GAP))
    draw = ImageDraw.Draw(page)
    top = side + 2 * GAP
    color_bar = np.tile(matplotlib.colormaps[COLOURS](np.linspace(0, 1, side // 2))[:, :3] * 255, (LINE // 2, 1, 1))
    left = 2 * GAP + side
    page.paste(Image.fromarray(color_bar.astype(np.uint8)), (left, top + LINE // 4))
    draw.text((left + side // 2 + GAP // 2, top), "0 to maximum", INK, _get_font("0"))
    draw.text((GAP, top), "input of the network", INK, _get_font("w"))
    for number, line in enumerate(wrapped):
        draw.text((GAP, top + LINE + GAP + number * LINE), line, INK, _get_font(line))
    return page


def _wrap_line(line: str, width: int) -> list[str]:
    characters = int(width / max(_get_font(line).getlength(line) / max(len(line), 1), 1))
    return textwrap.wrap(line, max(20, characters - 3)) or [""]


def _get_font(text: str) -> ImageFont.FreeTypeFont:
    return _load_font(is_in_default_font(text))


@cache
def _load_font(is_own: bool) -> ImageFont.FreeTypeFont:
    cjk_font = None if is_own else find_cjk_font_file()
    return ImageFont.truetype(str(cjk_font or font_manager.findfont(OWN)), LETTERS)
