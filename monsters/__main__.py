"""A sheet to look at: `python -m monsters --count 36 --size 200 --output monsters.png`."""

import argparse
import math

from PIL import Image, ImageDraw, ImageFont

from monsters import caption, draw


def contact_sheet(count: int, size: int, start: int = 0) -> Image.Image:
    """`count` monsters with their captions, in about as many columns as rows; each image size x size pixels."""
    columns = math.ceil(math.sqrt(count))
    font = ImageFont.load_default(max(9, size // 18))
    line_height = font.size * 1.25
    text_height = round(line_height * 5.6)
    sheet = Image.new("RGB", (columns * size, math.ceil(count / columns) * (size + text_height)), "white")
    pen = ImageDraw.Draw(sheet)
    for k in range(count):
        x, y = k % columns * size, k // columns * (size + text_height)
        sheet.paste(draw(start + k, size), (x, y))
        for n, line in enumerate(wrapped(caption(start + k), font, size * 0.94)):
            middle = (x + size / 2, y + size + n * line_height)
            pen.text(middle, line, fill=(70, 66, 74), font=font, anchor="ma")
    return sheet


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """The text in lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) < width else [*lines, word]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser("python -m monsters", description="Draw a sheet of monsters with their captions.")
    parser.add_argument("--count", type=int, default=36, help="how many monsters")
    parser.add_argument("--size", type=int, default=200, help="pixels of each image")
    parser.add_argument("--start", type=int, default=0, help="index of the first")
    parser.add_argument("--output", default="monsters.png", help="the file to write")
    options = parser.parse_args()
    if options.count < 1:
        parser.error(f"--count is 1 or more, not {options.count}.")
    try:
        contact_sheet(options.count, options.size, options.start).save(options.output, optimize=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"Drew {options.count} monsters: {options.output}")


if __name__ == "__main__":
    main()
