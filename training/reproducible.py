"""What makes a run repeatable: randomness by key, the processes that share a step, learning rate, average, precision.

Everything random is a function of (seed, step) over the global batch, not of history, and each process takes its slice:
so a run that was killed and resumed ends with the bits of one that was not, and two processes train what one would.
"""

import contextlib
import copy
import datetime
import hashlib
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.script import UserError

# ----------------------------------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------------------------------

TIMEOUT = datetime.timedelta(hours=24)  # how long processes wait for each other, such as while one encodes images


@dataclass(frozen=True)
class Processes:
    """This process among those that `torchrun` started; one alone is rank 0 of 1."""

    rank: int
    count: int
    device: torch.device
    local_rank: int = 0  # among the processes of this machine
    local_count: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until all processes are here."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """True on all processes if it is on one: a decision that all must take alike."""
        if self.count == 1:
            return flag
        flags = torch.tensor([int(flag)])  # on the CPU, so that it waits for no GPU
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def gather(self, value: object) -> list:
        """The values of all processes, by rank; small Python objects, on every process."""
        if self.count == 1:
            return [value]
        values: list = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes, on all of them."""
        if self.count == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value / self.count


def join_processes(device: torch.device) -> Processes:
    """Joins the group that `torchrun` describes in the environment, if it did; each process takes a GPU of its own."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes(0, 1, device)
    local_rank, local_count = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"--nproc_per_node {local_count}: each process needs a GPU, and this machine has "
                f"{torch.cuda.device_count()}."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = None
    if local_count == count and "TORCHELASTIC_RESTART_COUNT" in os.environ:
        # torchrun keeps its store over restarts, and with it the addresses of processes that are gone (pytorch#135712).
        # The count tells attempts apart, on one machine; README.md has the way for several.
        master, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", master)
    where = {"store": store, "rank": int(os.environ["RANK"]), "world_size": count} if store is not None else {}
    dist.init_process_group(backend, timeout=TIMEOUT, **where)
    return Processes(dist.get_rank(), count, device, local_rank, local_count)


def digest_of(tensors: list[Tensor]) -> str:
    """A digest of what is in some tensors, such as all images of a data set."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def job_id() -> str:
    """What this process's job is called, the same after a restart by `torchrun`; empty without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"torchrun {os.getppid()}" if name == "none" else name  # "none" is every job's, unless it was given a name


def was_restarted(processes: Processes) -> bool:
    """Whether `torchrun --max-restarts` has started this job again after a failure, as at least one process knows."""
    return processes.any(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0)


def without_synchronisation(unet: nn.Module) -> contextlib.AbstractContextManager:
    """Lets gradients add up on each process: several exchange theirs once a step, with the last part."""
    return unet.no_sync() if isinstance(unet, DistributedDataParallel) else contextlib.nullcontext()


# ----------------------------------------------------------------------------------------------------------------------
# Randomness
# ----------------------------------------------------------------------------------------------------------------------


def generator_for(device: torch.device, *key: int | str) -> torch.Generator:
    """A generator that is a function of `key` alone, such as (seed, "noise", step): what a resumed run needs.

    The key is hashed, since the CPU's generator keeps 32 bits of its seed and neighbouring keys must not look alike.
    """
    return torch.Generator(device).manual_seed(_number(*key) >> 1)


def _number(*key: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def batch_indices(count: int, batch_size: int, step: int, seed: int, device: torch.device) -> Tensor:
    """Which images step `step` sees, (batch_size,): every image once an epoch, shuffled by (seed, epoch).

    Costs O(batch_size), however many images there are: the shuffle is never written down, see `shuffled`.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // count
    parts = [shuffled(positions[epochs == e] % count, count, seed, e) for e in range(epochs[0], epochs[-1] + 1)]
    indices = torch.from_numpy(np.concatenate(parts))
    # A copy from pinned memory does not wait until the GPU has done the steps that it was sent before.
    return indices.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else indices.to(device)


def shuffled(positions: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """The elements at `positions` (int64, in [0, count)) of a permutation of range(count), one for each (seed, epoch).

    A Feistel network permutes 0…4^k - 1, where 4^k is the next such number above `count`; what it sends out of the
    range is sent through again ("cycle walking", Black & Rogaway 2002, Section 4), fewer than four times on average.
    """
    half = np.uint64(max((max(count - 1, 1).bit_length() + 1) // 2, 1))  # bits of each half
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.uint64(_number(seed, "epoch", int(epoch), i)) for i in range(8)]
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right, key) & mask)
        values[outside] = left << half | right
        outside = values >= count
    return values.astype(np.int64)


def _mixed(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """A hash of 64-bit numbers: the finaliser of splitmix64 (Steele et al. 2014, Figure 15)."""
    with np.errstate(over="ignore"):  # multiplication modulo 2^64 is the point
        values = (values ^ key) * np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# ----------------------------------------------------------------------------------------------------------------------
# Learning rate, average, precision
# ----------------------------------------------------------------------------------------------------------------------


def learning_rate_at(step: int, peak: float, warmup: int, total: int, floor: float = 0.0) -> float:
    """Linear warm-up over `warmup` steps, then half a cosine down to `floor` · peak at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


class EMA:
    """An exponential moving average of a network's weights (Polyak & Juditsky 1992).

    The decay is min(decay, (1 + step) / (10 + step)), so that the random start is soon forgotten. `device` is where the
    average is kept; the module's own if None. Parameters that are not trained are shared with the module, not copied.
    """

    def __init__(self, module: nn.Module, decay: float, device: torch.device | str | None = None) -> None:
        self.decay = decay
        frozen = {id(p): p for p in module.parameters() if not p.requires_grad}
        self.module = copy.deepcopy(module, frozen).eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = zip(self.module.parameters(), module.parameters(), strict=True)
        averages, current = zip(*((average, p) for average, p in pairs if p.requires_grad), strict=True)
        if averages[0].device == current[0].device:
            torch._foreach_lerp_(averages, current, 1 - decay)
        else:
            for average, parameter in zip(averages, current, strict=True):  # one by one: no second copy of the network
                average.lerp_(parameter.to(average.device), 1 - decay)


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The type that autocast computes in: "auto" is bfloat16 where the hardware has it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if device.type == "cpu" and has_bf16() else torch.float32


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for AdamW: matrices and filters decay, gains and biases (one-dimensional) do not."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Takes up moments and step counts; rates and weight decay stay as the options have them now.

    Moments come to lie in memory as their parameters do, which may be another way than where the run was begun: fused
    kernels walk through both side by side without a look at strides.
    """
    options = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, options, strict=True):
        group.update(values)
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def clip_and_step(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """Clips the gradients to `max_norm` (0 = off), steps, clears them; returns their norm before clipping (0-d).

    A gradient that is not finite changes nothing: a fused optimizer skips its step where `found_inf` says so, which is
    decided on the device, so that the host need not wait for it.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    optimizer.found_inf, optimizer.grad_scale = (~norm.isfinite()).float(), None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
