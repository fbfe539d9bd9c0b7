"""Monsters by index: `describe` gives the record, `draw` the image, `caption` a sentence, `load_monsters` a data set.

An index is all there is to a monster. The same index gives the same bytes in every process, and a caption is true by
construction, since both are made from the same record.
"""

import hashlib
import math
import os
from contextlib import nullcontext
from dataclasses import replace
from io import BytesIO
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from monsters.anatomy import assemble, boxes_of
from monsters.captions import write_caption
from monsters.drawing import draw_part
from monsters.record import Monster, roll
from monsters.workers import worker_processes

if TYPE_CHECKING:
    from datasets import Dataset

# ---------------------------------------------------------------------------------------------------------------------
# One monster
# ---------------------------------------------------------------------------------------------------------------------


def describe(index: int) -> Monster:
    """The full record of monster `index`, boxes included; nothing is drawn for it."""
    monster = roll(index)
    return replace(monster, boxes=boxes_of(monster))


def draw(index: int, size: int = 512) -> Image.Image:
    """Monster `index` on white as an RGB image of size x size pixels (16..4096)."""
    return render(roll(index), size)


def render(monster: Monster, size: int = 512) -> Image.Image:
    """A record as an RGB image; `replace(monster, wings="none")` gives the same monster without its wings."""
    check_size(size)
    oversampling = 4 if size <= 128 else 3 if size <= 1024 else 2
    canvas = Image.new("RGB", (size * oversampling, size * oversampling), "white")
    for part in assemble(monster):
        draw_part(canvas, part)
    return canvas.reduce(oversampling)


def check_size(size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or not 16 <= size <= 4096:
        raise ValueError(f"A monster's image is 16 to 4096 pixels wide, not {size!r}: choose a size in between.")


def caption(index: int) -> str:
    """One true English sentence about monster `index`; a few attributes may be left out."""
    return write_caption(roll(index))


# ---------------------------------------------------------------------------------------------------------------------
# Many monsters
# ---------------------------------------------------------------------------------------------------------------------

DEFAULT_COUNT = 64
CHUNK = 4  # monsters that a worker draws at a time: few, since an interrupted run waits for them

# the modules of this package that decide what is drawn and said
SOURCES = ("record", "captions", "drawing", "bodies", "attachments", "face", "anatomy", "dataset")


def source_version() -> str:
    """A hash of the code that draws and captions, so that cached images are drawn again when it changes."""
    here = Path(__file__).resolve().parent
    code = b"".join((here / f"{name}.py").read_bytes() for name in SOURCES)
    return hashlib.sha256(code).hexdigest()[:16]


def parse_spec(text: str) -> int:
    """How many monsters `monsters` (the default count) or `monsters:N` asks for."""
    name, colon, count = text.partition(":")
    if name != "monsters":
        raise ValueError(f"The data set {text!r} is not one of drawn monsters: write monsters or monsters:2000.")
    if not colon:
        return DEFAULT_COUNT
    if not (count.isascii() and count.isdigit() and len(count) < 8 and int(count) > 0):
        raise ValueError(f"The data set {text!r} needs a count from 1 to 9999999 after the colon, as in monsters:2000.")
    return int(count)


def load_monsters(count: int, size: int = 512, start: int = 0, num_proc: int | None = None) -> "Dataset":
    """Monsters start..start+count-1 as a `datasets.Dataset` with `image` and `text`, drawn once and then cached.

    `num_proc` processes draw, by default one for each core; the data set does not depend on it.
    """
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"The number of monsters is an integer of 1 or more, not {count!r}.")
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise ValueError(f"The first monster's index is an integer of 0 or more, not {start!r}.")
    check_size(size)  # here, not in a worker
    # from_generator's own num_proc is not used: when the main process is killed, its workers go on.
    workers = min(num_proc or os.cpu_count() or 1, math.ceil(count / 16))  # a few monsters are not worth a process
    with worker_processes(workers) if workers > 1 else nullcontext() as pool:
        tasks = range(start, start + count), repeat(size)
        return Dataset.from_generator(
            lambda: pool.map(data_row, *tasks, chunksize=CHUNK) if pool else map(data_row, *tasks),
            features=Features({"image": ImageFeature(), "text": Value("string")}),
            fingerprint=f"monsters-{start}-to-{start + count - 1}-{size}px-{source_version()}",  # names the cached file
        )


def data_row(index: int, size: int) -> dict:
    """A monster as a row of the data set, its image as PNG bytes."""
    buffer = BytesIO()
    draw(index, size).save(buffer, "PNG", compress_level=4)
    return {"image": {"bytes": buffer.getvalue(), "path": None}, "text": caption(index)}
