"""What was encoded once is kept: an append-only store of rows, each found by the content that it was made from.

A cache is a folder for one encoder. In it, each process that encodes appends records of one size to a file of its own:

    checksum (4 bytes) | key (32 bytes: SHA-256 of what was encoded) | values (float16, one shape for all rows)

So nobody waits for a lock, a process that is killed loses the batch in hand and no more, an image that is added encodes
one image, and several runs may use the folder at once. Large files are memory-mapped for reading, small ones are
read whole: a mapped file holds a descriptor, of which a process has few. A row whose checksum is wrong counts as
missing and is encoded again: the end of a file that was cut short, a worn disk, a file from elsewhere.

Processes share the work (`encode_missing`), and the bits of a row do not depend on how it was shared: see there.
"""

import contextlib
import errno
import hashlib
import json
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sampling.packed import give_memory_back
from training.background import Progress, decoding_threads, in_order
from training.reproducible import Processes
from training.script import UserError

# ----------------------------------------------------------------------------------------------------------------------
# The store
# ----------------------------------------------------------------------------------------------------------------------

READ_WHOLE = 2**20  # bytes; files of a run that encoded a few rows are smaller


class EncodedCache:
    """The rows of one encoder, by key. `made_by` says what encoded them; another encoder has another folder."""

    def __init__(self, folder: Path, made_by: dict[str, str], shape: tuple[int, ...]) -> None:
        description = json.dumps(made_by | {"shape": list(shape)}, indent=2, sort_keys=True)
        self.folder = folder / hashlib.sha256(description.encode()).hexdigest()[:32]
        self.description, self.shape = description, shape
        self.record = np.dtype([("checksum", "<u4"), ("key", "V32"), ("values", "<f2", shape)])
        self.files: list[np.ndarray] = []  # records
        self.places: dict[bytes, tuple[int, int]] = {}  # key → which of `files`, which row of it
        self.damaged: set[bytes] = set()  # keys that were found, but in no sound row
        self._mapped: dict[Path, tuple[int, int]] = {}  # path → which of `files`, how many rows that has
        self._output = None

    def missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """Those of `keys` that have no sound row here. Looks at the folder again: others may have written meanwhile."""
        keys = list(keys)
        wanted = set(keys) - self.places.keys()
        for path in sorted(self.folder.glob("*.rows")) if wanted else []:
            number = self._map(path)
            for row, key in enumerate(self.files[number]["key"].tolist() if number is not None else []):
                if key in wanted:
                    if self._is_sound(number, row):
                        self.places[key] = number, row
                        wanted.discard(key)
                        self.damaged.discard(key)
                    else:
                        self.damaged.add(key)
        return [key for key in dict.fromkeys(keys) if key in wanted]

    def append(self, keys: Sequence[bytes], values: np.ndarray) -> None:
        """Writes rows (n, *shape) to this process's own file; a kill right after it loses nothing."""
        records = np.zeros(len(keys), self.record)
        records["key"] = np.frombuffer(b"".join(keys), "V32")
        records["values"] = values
        records["checksum"] = [self._checksum(records[i : i + 1]) for i in range(len(keys))]
        try:
            if self._output is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "made_by.json").write_text(self.description + "\n", encoding="utf-8")  # for people
                self._output = open(self.folder / f"{uuid.uuid4().hex}.rows", "xb", buffering=0)
            rest = memoryview(records.tobytes())
            while rest:
                rest = rest[self._output.write(rest) :]
        except OSError as error:
            self.close()  # half a record may stand at its end: the next row begins a new file
            _refuse_too_many_files(error)
            raise UserError(
                f"the cache {self.folder} cannot be written ({error.strerror}): free some space, or set the "
                "environment variable HF_DATASETS_CACHE to a folder that has room."
            ) from error

    def close(self) -> None:
        """Closes the file that this process appends to; `append` would begin another."""
        if self._output is not None:
            self._output.close()
            self._output = None

    def _map(self, path: Path) -> int | None:
        """Which of `files` holds all complete records of a file; None if it has none or cannot be read."""
        try:
            count = path.stat().st_size // self.record.itemsize
            if count and self._mapped.get(path, (0, 0))[1] != count:
                if count * self.record.itemsize < READ_WHOLE:
                    self.files.append(np.fromfile(path, self.record, count))
                else:
                    self.files.append(np.memmap(path, self.record, "r", shape=(count,)))
                self._mapped[path] = len(self.files) - 1, count
        except (OSError, ValueError) as error:
            _refuse_too_many_files(error)
            return None  # not ours to read, or removed in this moment: its rows are missing, that is all
        return self._mapped[path][0] if count else None

    def _is_sound(self, number: int, row: int) -> bool:
        record = self.files[number][row : row + 1]
        return int(record["checksum"][0]) == self._checksum(record)

    def _checksum(self, record: np.ndarray) -> int:
        """Of key and values, and of the folder's name: a file from another encoder's folder does not fit."""
        return zlib.crc32(record.view(np.uint8)[4:], zlib.crc32(self.folder.name.encode()))


def _refuse_too_many_files(error: Exception) -> None:
    """UserError if that is what is wrong: neither the folder nor its disk is to blame then."""
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        raise UserError(f"{error.strerror}: allow this process more of them, such as by `ulimit -n 4096`.") from error


class Rows:
    """Rows of a cache, one for each of `keys`, indexed like a tensor.

    They are on the device if they fit into `budget` bytes there, else gathered from the cache's files.
    """

    def __init__(self, cache: EncodedCache, keys: Sequence[bytes], device: torch.device, budget: int) -> None:
        self.device, self.files, self.shape = device, [file["values"] for file in cache.files], cache.shape
        self.number, self.row = np.array([cache.places[key] for key in keys], np.int64).reshape(-1, 2).T
        self.resident: Tensor | None = None
        if len(keys) * int(np.prod(cache.shape)) * 2 <= budget:
            self.resident = torch.empty((len(keys), *cache.shape), dtype=torch.float16, device=device)
            for start in range(0, len(keys), 256):  # in parts: the whole is never held twice
                some = np.arange(start, min(start + 256, len(keys)))
                self.resident[start : start + 256] = torch.from_numpy(self._read(some)).to(device)

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: Tensor | tuple[Tensor, ...]) -> Tensor:
        """`rows[indices]`, or `rows[indices, parts]` for a part of each: float16, on the device."""
        if self.resident is not None:
            return self.resident[index]
        first, *rest = (i.cpu().numpy() for i in (index if isinstance(index, tuple) else (index,)))
        values = torch.from_numpy(self._read(first, *rest))
        if self.device.type == "cuda":  # only pinned memory is copied while the GPU works on
            return values.pin_memory().to(self.device, non_blocking=True)
        return values.to(self.device)

    @property
    def nbytes(self) -> int:
        """Bytes on the device, or in the CPU's memory beside the cache's files."""
        return 0 if self.resident is None else self.resident.nbytes

    def _read(self, index: np.ndarray, *rest: np.ndarray) -> np.ndarray:
        number, row = self.number[index], self.row[index]
        values = np.empty((len(index), *self.shape[len(rest) :]), np.float16)
        for n in np.unique(number):
            here = number == n
            values[here] = self.files[n][(row[here], *(part[here] for part in rest))]
        return values


# ----------------------------------------------------------------------------------------------------------------------
# Encoding what is missing
# ----------------------------------------------------------------------------------------------------------------------


def encode_missing(
    cache: EncodedCache,
    keys: Sequence[bytes],
    load: Callable[[list[int]], Tensor],
    encode: Callable[[Tensor], Tensor],
    encoder: nn.Module,
    batch_size: int,
    processes: Processes,
    what: str,
    workers: int | None = None,
) -> None:
    """Encodes the rows of `keys` (distinct, the same on all processes) that the cache lacks, each process its share.

    `load` reads what is at some indices of `keys`, in threads, ahead of `encode`, which gives one row for each. `load`
    makes every batch as long as `batch_size`, the last one too: kernels are chosen by shape, so the bits of a row would
    otherwise depend on how many were encoded with it, and a resumed run would not be equal to an uninterrupted one.
    `workers`: how many batches are encoded beside each other on a CPU, one by each of its threads if None.
    """
    # Machines may share no disk: what is still missing after all processes have shared the work is shared by those of
    # each machine, and what a process does not see even then it encodes alone.
    for sharing in ("all", "machine", "alone"):
        lacking = set(cache.missing(keys))
        if cache.damaged and processes.is_main and sharing == "all":
            text = f"{len(cache.damaged)} rows in {cache.folder} are damaged and will be encoded again."
            warnings.warn(text, stacklevel=4)
        everyone = processes.gather([i for i, key in enumerate(keys) if key in lacking])
        if not any(everyone):
            return
        first = processes.rank - processes.local_rank
        ranks = {
            "all": range(processes.count),
            "machine": range(first, first + processes.local_count),
            "alone": range(processes.rank, processes.rank + 1),
        }[sharing]
        together = sorted(set().union(*(everyone[rank] for rank in ranks)))
        share = [i for i in together[ranks.index(processes.rank) :: len(ranks)] if keys[i] in lacking]
        batches = [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
        if share:
            encoder.to(processes.device).eval()
        with (
            Progress(len(share), what, processes) as progress,
            contextlib.closing(_encoded(batches, load, encode, processes, workers)) as encoded,
        ):
            for batch, values in zip(batches, encoded, strict=True):
                cache.append([keys[i] for i in batch], values[: len(batch)])
                progress.add(len(batch))
        cache.close()
        give_memory_back()  # what was encoded next would have tensors of other sizes
        processes.barrier()
    if cache.missing(keys):
        raise UserError(f"the cache {cache.folder} cannot be read back as it was written: its disk is damaged or full.")


def _encoded(
    batches: list[list[int]],
    load: Callable[[list[int]], Tensor],
    encode: Callable[[Tensor], Tensor],
    processes: Processes,
    workers: int | None,
) -> Iterator[np.ndarray]:
    """float16 values of each batch, in order; later batches are loaded meanwhile.

    On a CPU, a batch is computed by one thread and several batches beside each other, since how many threads share an
    operation also decides about bits. It is faster, too: on two cores with other work, the shipped VAE took 0.31 s
    for an image of 256 and its mirror with two workers, and 0.48 s in batches of four with two threads in each
    operation.
    """

    @torch.no_grad()
    def rows(loaded: Tensor) -> np.ndarray:
        values = encode(loaded).to(torch.float16)
        if not torch.isfinite(values).all():
            raise UserError(
                "the encoder gives numbers that are not finite or too large for float16: check its weights, or try "
                "--precision float32."
            )
        return values.cpu().numpy()

    if processes.device.type != "cpu":
        yield from map(rows, in_order(load, batches, decoding_threads(processes)))
        return
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # in this thread, and in those that are started from now on
        yield from in_order(lambda batch: rows(load(batch)), batches, workers or threads)
    finally:
        torch.set_num_threads(threads)


# ----------------------------------------------------------------------------------------------------------------------
# Which encoder made them
# ----------------------------------------------------------------------------------------------------------------------


def fingerprint(*modules: nn.Module, dtype: torch.dtype | None = None) -> str:
    """A digest of networks' weights, names and types: another weight, another digest. `dtype`: as if they had it."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            tensor = tensor.to(dtype or tensor.dtype)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that turns a text into ids: vocabulary, merges, normalisation, and the ids that frame a text."""
    content: dict = {"ids": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]}
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        left_by_the_last_call = {"truncation": None, "padding": None}
        content |= json.loads(backend.to_str()) | left_by_the_last_call
    else:
        content |= {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256(content: bytes) -> bytes:
    """The key of an image file or a caption."""
    return hashlib.sha256(content).digest()


def cache_folder(kind: str) -> Path:
    """Under the cache of `datasets`, which the environment variable HF_DATASETS_CACHE moves."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "stable_diffusion" / kind
