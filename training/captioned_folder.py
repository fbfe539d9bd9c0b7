"""A folder of images with captions → paths and captions; what is wrong with it is one sentence with file and line.

Captions stand in a `metadata.jsonl` or `metadata.csv` (columns `file_name` and a caption column), in the folder or
below, or in a .txt beside each image. Folders called train, validation or test are splits. Hidden files are skipped.
"""

import csv
import io
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from training.image_files import IMAGE_SUFFIXES, is_image
from training.script import UserError

OTHER_DATA = {".parquet", ".arrow", ".tar", ".zip", ".gz", ".json", ".jsonl", ".csv"}  # `datasets` may know what it is
METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "en_text", "caption")  # tried in this order when --caption_column is not given
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
SHOWN = 3  # problems that a message tells one by one


def read_folder(
    folder: str, split: str, caption_column: str | None, caption: str | None
) -> tuple[list[str], list[str]] | None:
    """Paths and captions of the images of a split; None if the folder holds something else, such as parquet files.

    `caption` is for all images, of a folder that has no captions. Raises UserError.
    """
    folder = os.path.normpath(folder)
    files = list(_walk(folder))
    suffixes = {os.path.splitext(path)[1].lower() for path in files}
    metadata = [path for path in files if os.path.basename(path).lower() in METADATA]
    images = [path for path in files if is_image(path)]
    if suffixes & {".parquet", ".arrow"} or (not (images or metadata) and suffixes & OTHER_DATA):
        return None
    if metadata:
        captions = _captions_of_metadata(folder, metadata, caption_column, caption)
    elif caption_column is not None:
        raise UserError(f"--caption_column {caption_column}: {folder} has no metadata.jsonl or .csv with columns.")
    elif not images:
        raise UserError(f"--dataset {folder}: there are no images in this folder.")
    else:
        captions = _captions_of_texts(folder, images, files, caption)
    paths = _of_split(folder, list(captions), split)
    if metadata and (left_out := len(set(images) - captions.keys())):
        warnings.warn(f"{folder}: {left_out} images stand in no metadata file and are left out.", stacklevel=3)
    if caption is not None and (left_out := len(captions) - len(paths)):
        warnings.warn(f"{folder}: {left_out} images lie in folders of other splits and are left out.", stacklevel=3)
    return paths, [captions[path] for path in paths]


def _walk(folder: str) -> Iterator[str]:
    """Paths of all files below, sorted; each folder once, however many links lead to it, and no hidden ones."""
    visited = set()

    def refuse(error: OSError) -> None:
        raise UserError(f"--dataset {folder}: {error.filename} cannot be listed ({error.strerror}).") from error

    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(where)
        if real in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            path = os.path.join(where, name)
            if not name.startswith(".") and os.path.isfile(path):  # no pipe, no link that leads nowhere
                if not _is_unicode(path):
                    raise UserError(f"--dataset {folder}: the file name {path!r} is not UTF-8; rename the file.")
                yield path


def _is_unicode(text: str) -> bool:
    """False if a text holds halves of characters, which can be neither stored nor printed."""
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False


def _of_split(folder: str, paths: list[str], split: str) -> list[str]:
    """Those of `paths` that belong to a split: all of them, unless there are folders that are called like splits."""
    names = {alias: name for name, aliases in SPLIT_FOLDERS.items() for alias in aliases}
    splits: dict[str, list[str]] = {}
    for path in paths:
        first, *below = os.path.relpath(path, folder).split(os.sep)
        splits.setdefault(names.get(first.lower(), "train") if below else "train", []).append(path)
    if split not in splits:
        raise UserError(f"--split {split}: {folder} has only {' and '.join(splits) or 'empty splits'}.")
    return splits[split]


# ----------------------------------------------------------------------------------------------------------------------
# A .txt beside each image
# ----------------------------------------------------------------------------------------------------------------------


def _captions_of_texts(folder: str, images: list[str], files: list[str], caption: str | None) -> dict[str, str]:
    stems = {os.path.splitext(path)[0]: path for path in files if path.lower().endswith(".txt")}
    texts = {path: stems[stem] for path in images if (stem := _without_suffix(path)) in stems}
    if caption is not None:
        if own := next((text for text in texts.values() if _read_text(text).strip()), None):
            raise UserError(f"--caption: {folder} has captions of its own ({own}); leave the option out.")
        return dict.fromkeys(images, caption)
    if without := [os.path.basename(path) for path in images if path not in texts]:
        shown = ", ".join(without[:SHOWN]) + (f" and {len(without) - SHOWN} more" if len(without) > SHOWN else "")
        raise UserError(
            f"--dataset {folder}: {len(without)} of {len(images)} images have no caption ({shown}): put a .txt beside "
            "each, or write a metadata.jsonl with file_name and text for every image"
            + ("." if texts else "; train_stable_diffusion.py gives all of them one, with --caption.")
        )
    return {path: " ".join(_read_text(text).split()) for path, text in texts.items()}


def _without_suffix(image: str) -> str:
    """An image's path as its .txt begins; "Dr. Fox" has no suffix."""
    stem, suffix = os.path.splitext(image)
    return stem if suffix.lower() in IMAGE_SUFFIXES else image


def _read_text(path: str) -> str:
    """A text file without its byte-order mark; UserError names the line that is not UTF-8."""
    try:
        content = Path(path).read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8; save the file in that encoding.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error


# ----------------------------------------------------------------------------------------------------------------------
# metadata.jsonl and metadata.csv
# ----------------------------------------------------------------------------------------------------------------------


def _captions_of_metadata(
    folder: str, metadata: list[str], caption_column: str | None, caption: str | None
) -> dict[str, str]:
    """Path → caption, in the order of the lines; one UserError for all problems.

    `caption` is for all, of a file without captions.
    """
    folders = [os.path.dirname(path) for path in metadata]
    if doubled := [path for path in metadata if folders.count(os.path.dirname(path)) > 1]:
        raise UserError(f"{doubled[0]}: there is {os.path.basename(doubled[1])} beside it; remove one of the two.")
    lines = [(path, number, row) for path in metadata for number, row in _read_metadata(path)]
    columns = list(dict.fromkeys(name for _, _, row in lines for name in row))
    wanted = [caption_column] if caption_column else CAPTION_COLUMNS
    column = next((name for name in wanted if name in columns), None)
    if column is not None and caption is not None:
        raise UserError(f"--caption: {folder} has captions of its own ({metadata[0]}); leave the option out.")
    if column is None and (caption is None or caption_column):
        others = ", ".join(str(name) for name in columns if name != "file_name") or "no others"
        raise UserError(
            f"--caption_column {caption_column}: {metadata[0]} has the columns {others}."
            if caption_column
            else f"{metadata[0]}: no column is called {', '.join(CAPTION_COLUMNS)}; it has {others}: choose one with "
            "--caption_column; or train_stable_diffusion.py gives all images one caption, with --caption."
        )
    captions: dict[str, str] = {}
    first_lines: dict[str, str] = {}
    problems = []
    for path, number, row in lines:
        here = f"{path}, line {number}"
        try:
            image, text = _image_of(row, folder, path), _text_of(row, column) if column else caption
            if image in captions:
                first = first_lines[image].removeprefix(f"{path}, ")
                raise UserError(f"{row['file_name']} stands already in {first}")
            captions[image], first_lines[image] = text, here
        except UserError as problem:
            problems.append(f"{here}: {problem}")
    if problems:
        more = f" (and {len(problems) - SHOWN} lines more)" if len(problems) > SHOWN else ""
        raise UserError("; ".join(problems[:SHOWN]) + more + ".")
    if not captions:
        raise UserError(f"{metadata[0]}: there are no lines in it.")
    return captions


def _image_of(row: dict, folder: str, metadata: str) -> str:
    """The path of the image that a row names; UserError says what is wrong with the name."""
    name = row.get("file_name")
    if name is None:
        raise UserError("file_name is missing")
    if not isinstance(name, str) or not name:
        raise UserError(f"file_name is {str(name)[:40]!r}, which is no file's name")
    shown = name[:80].encode(errors="backslashreplace").decode()
    name = os.path.normpath(name.replace("\\", "/"))  # Windows writes \
    path = os.path.normpath(os.path.join(os.path.dirname(metadata), name))
    if os.path.isabs(name) or name[1:2] == ":":
        raise UserError(f"file_name is an absolute path ({shown}); write it relative to the metadata file")
    if os.path.relpath(path, folder).split(os.sep)[0] == "..":
        raise UserError(f"file_name leads out of the folder ({shown})")
    if not _is_unicode(name) or not os.path.isfile(path):
        raise UserError(f"there is no file {shown}")
    return path


def _text_of(row: dict, column: str) -> str:
    """The caption in a row, "" for null; UserError says what is wrong with it."""
    if column not in row:
        raise UserError(f"{column} is missing")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{column} is {str(text)[:40]}, which is not a text in quotes")
    if text and not _is_unicode(text):
        raise UserError(f"{column} holds half a character (\\ud800 to \\udfff)")
    return text or ""


def _read_metadata(path: str) -> Iterator[tuple[int, dict]]:
    """Line numbers and rows as dicts."""
    text = _read_text(path)
    if path.lower().endswith(".csv"):
        return _read_csv(path, text)
    return _read_jsonl(path, text)


def _read_jsonl(path: str, text: str) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also split at U+2028, inside a caption
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise UserError(f"{path}, line {number}: not JSON ({reason}).") from error
        if not isinstance(row, dict):
            raise UserError(f'{path}, line {number}: not an object like {{"file_name": "a.png", "text": "a caption"}}.')
        yield number, row


def _read_csv(path: str, text: str) -> Iterator[tuple[int, dict]]:
    # Strict, because a quote that is not closed would swallow the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    number = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        if "file_name" not in header or len(set(header)) < len(header):
            raise UserError(f"{path}, line 1: the columns are {header}; there must be one file_name and one text.")
        for values in reader:
            number = reader.line_num
            if not values:
                continue
            if len(values) != len(header):
                raise UserError(
                    f"{path}, line {number}: {len(values)} values for {len(header)} columns; a caption with a comma "
                    "must stand in quotes."
                )
            yield number, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV ({error}).") from error
