"""Monsters by index: `describe` gives the record, `draw` the image, `caption` a sentence, `load_monsters` a data set.

An index is all there is to a monster. The same index gives the same bytes in every process, and a caption is true by
construction, since both are made from the same record.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from io import BytesIO
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from tqdm import tqdm

from monsters.anatomy import assemble, boxes_of
from monsters.captions import write_caption
from monsters.drawing import draw_part
from monsters.record import TURQUOISE, Monster, roll
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

DEFAULT_COUNT = 2000
CHUNK = 4  # monsters that a worker draws at a time: few, since an interrupted run waits for them

# the modules of this package that decide what is drawn and said
SOURCES = ("record", "captions", "drawing", "bodies", "attachments", "face", "anatomy", "dataset")


def source_version() -> str:
    """A hash of the code that draws and captions, so that cached images are drawn again when it changes."""
    here = Path(__file__).resolve().parent
    code = b"".join((here / f"{name}.py").read_bytes() for name in SOURCES)
    return hashlib.sha256(code).hexdigest()[:16]


def is_spec(text: str) -> bool:
    """Whether a data set's name asks for monsters, rightly written or not."""
    return text.split(":")[0] == "monsters"


def indices_of(text: str) -> Sequence[int]:
    """Which monsters a data set's name asks for: `monsters` for the first 2,000, `monsters:N` for the first N.

    Of `monsters:N:turquoise`, every second one is turquoise, which no other monster is. Raises ValueError.
    """
    name, *rest = text.split(":")
    if name != "monsters" or len(rest) > 2 or rest[1:] not in ([], ["turquoise"]):
        raise ValueError(
            f"The data set {text!r} is not one of drawn monsters: write monsters:2000, or monsters:200:turquoise."
        )
    count = rest[0] if rest else str(DEFAULT_COUNT)
    if not (count.isascii() and count.isdigit() and len(count) < 8 and int(count) > 0):
        raise ValueError(f"The data set {text!r} needs a count from 1 to 9999999 after the colon, as in monsters:2000.")
    every = range(int(count))
    return [TURQUOISE + i if i % 2 else i for i in every] if rest[1:] else every


def load_monsters(
    which: int | Sequence[int], size: int = 512, start: int = 0, num_proc: int | None = None
) -> "Dataset":
    """Monsters as a `datasets.Dataset` with `image` and `text`, drawn once and then cached.

    `which`: their indices, or how many there are from `start` on. `num_proc` processes draw, by default one for each
    core; the data set does not depend on it.
    """
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    if isinstance(which, bool) or not isinstance(which, int | Sequence) or (isinstance(which, int) and which < 1):
        raise ValueError(f"The number of monsters is an integer of 1 or more, not {which!r}.")
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise ValueError(f"The first monster's index is an integer of 0 or more, not {start!r}.")
    check_size(size)  # here, not in a worker
    indices = range(start, start + which) if isinstance(which, int) else which
    count, name = len(indices), hashlib.sha256(str(indices).encode()).hexdigest()[:16]
    # from_generator's own num_proc is not used: when the main process is killed, its workers go on.
    workers = min(num_proc or os.cpu_count() or 1, math.ceil(count / 16))  # a few monsters are not worth a process
    with worker_processes(workers) if workers > 1 else nullcontext() as pool, _without_bars():

        def rows() -> Iterator[dict]:
            tasks = indices, repeat(size)
            drawn = pool.map(data_row, *tasks, chunksize=CHUNK) if pool else map(data_row, *tasks)
            yield from tqdm(drawn, f"drawing monsters at {size}×{size}", count, disable=None)

        return Dataset.from_generator(
            rows,
            features=Features({"image": ImageFeature(), "text": Value("string")}),
            fingerprint=f"monsters-{name}-{size}px-{source_version()}",  # names the cached file
        )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the progress bars of `datasets`, which would show the same thing under another name."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def data_row(index: int, size: int) -> dict:
    """A monster as a row of the data set, its image as PNG bytes."""
    buffer = BytesIO()
    draw(index, size).save(buffer, "PNG", compress_level=4)
    return {"image": {"bytes": buffer.getvalue(), "path": None}, "text": caption(index)}
