"""What may be asked of `StableDiffusion.sample`: one value or one each, made N of everything, or refused in a sentence.

Letters: N pictures, H × W their size, L text positions, D width of the text encoding.
"""

from collections.abc import Callable, Iterable
from numbers import Integral

import torch
from PIL import Image
from torch import Tensor

from images import to_rgb


def texts_of(prompts: object, name: str) -> list[str]:
    """A string, or several, as a list with at least one; ValueError for anything else."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts) if isinstance(prompts, Iterable) else [prompts]
    if not texts:
        raise ValueError(f"{name} is empty: pass at least one text.")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name} must be text or a list of texts, but holds {text!r}.")
    return texts


def one_each(values: list, n: int, name: str) -> list:
    """One value repeated for all N pictures, or N values as they are."""
    if len(values) == 1:
        return values * n
    if len(values) != n:
        raise ValueError(f"{name}: {len(values)} given for {n} prompts; pass one for all or one each.")
    return values


def generators_of(seeds: object, n: int) -> list[torch.Generator]:
    """A private source of noise for each picture, on the CPU, so that a seed means the same noise on every device."""
    seeds = [seeds + i for i in range(n)] if isinstance(seeds, Integral) else seeds
    seeds = list(seeds) if isinstance(seeds, Iterable) else [seeds]
    for seed in seeds:
        if not isinstance(seed, Integral) or not 0 <= seed < 2**63:
            raise ValueError(f"seeds must be whole numbers from 0 to 2^63 - 1, not {seed!r}.")
    if len(seeds) != n:
        raise ValueError(f"seeds: {len(seeds)} given for {n} prompts; pass one number, or one each.")
    return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]


def latent_size(height: object, width: object, factor: int) -> tuple[int, int]:
    """(h, w) of the latents of a picture; ValueError if its size is not divisible by the VAE's factor."""
    for name, length in {"height": height, "width": width}.items():
        if not isinstance(length, Integral) or length < factor or length % factor:
            below = max(int(length) // factor, 1) * factor if isinstance(length, Integral) else 512
            raise ValueError(f"{name} must be positive and divisible by {factor}, such as {below}, not {length!r}.")
    return int(height) // factor, int(width) // factor


def pixels_for(
    pictures: object, to_pixels: Callable[[Image.Image], Tensor], n: int, height: int, width: int, name: str
) -> Tensor:
    """One picture for all or one each → (N, C, H, W) by `to_pixels`; ValueError unless they have the size asked for."""
    single = isinstance(pictures, Image.Image) or not isinstance(pictures, Iterable)
    pictures = one_each([pictures] if single else list(pictures), n, name)
    for i, picture in enumerate(pictures):
        if not isinstance(picture, Image.Image):
            raise ValueError(f"{name}[{i}] must be a PIL picture, not {type(picture).__name__}.")
    pictures = [to_rgb(picture) for picture in pictures]  # upright, which may swap its sides
    for i, picture in enumerate(pictures):
        if picture.size != (width, height):
            raise ValueError(
                f"{name}[{i}] is {picture.width}×{picture.height}, but the picture asked for is {width}×{height}: "
                "resize it, or ask for its own width and height."
            )
    return torch.stack([to_pixels(picture) for picture in pictures])


def check_tensor(tensor: Tensor, shape: tuple[int | None, ...], name: str) -> None:
    """ValueError unless the tensor has this shape (None = any length but 0) and only finite numbers."""
    fits = tensor.ndim == len(shape) and all(
        have == want if want is not None else have > 0 for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{name} must be a tensor of shape ({wanted}), not {tuple(tensor.shape)}.")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds numbers that are not finite.")
