"""What may be asked of `StableDiffusion.sample`: each argument becomes N values, one for each image, or a ValueError
that says in one sentence what is wrong with it.

Letters: N images, C channels, H × W their size, h × w that of their latents.
"""

from collections.abc import Callable, Iterable
from numbers import Integral

import torch
from PIL import Image
from torch import Tensor

from images import to_rgb


def texts_of(texts: object, name: str) -> list[str]:
    """One text or several → a list of at least one."""
    several = [texts] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
    if not several:
        raise ValueError(f"{name} is empty: pass at least one text.")
    for text in several:
        if not isinstance(text, str):
            raise ValueError(f"{name} must be text or a list of texts, but holds {text!r}.")
    return several


def one_each(values: list, n: int, name: str) -> list:
    """One value → the same for all N images; N values stay as they are."""
    if len(values) == 1:
        return values * n
    if len(values) != n:
        raise ValueError(f"{name}: {len(values)} given for {n} prompts; pass one for all or one each.")
    return values


def generators_of(seeds: object, n: int) -> list[torch.Generator]:
    """One seed s (which stands for s, s+1, …) or N seeds → a generator for each image.

    They are on the CPU, so that a seed gives the same noise on every device.
    """
    seeds = [seeds + i for i in range(n)] if isinstance(seeds, Integral) else seeds
    seeds = list(seeds) if isinstance(seeds, Iterable) else [seeds]
    for seed in seeds:
        if not isinstance(seed, Integral) or not 0 <= seed < 2**63:
            raise ValueError(f"seeds must be whole numbers from 0 to 2^63 - 1, not {seed!r}.")
    if len(seeds) != n:
        raise ValueError(f"seeds: {len(seeds)} given for {n} prompts; pass one number, or one each.")
    return [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]


def latent_size(height: object, width: object, factor: int) -> tuple[int, int]:
    """The size of an image → (h, w) of its latents; both sides must be divisible by the VAE's factor."""
    for name, length in {"height": height, "width": width}.items():
        if not isinstance(length, Integral) or length < factor or length % factor:
            below = max(int(length) // factor, 1) * factor if isinstance(length, Integral) else 512
            raise ValueError(f"{name} must be positive and divisible by {factor}, such as {below}, not {length!r}.")
    return int(height) // factor, int(width) // factor


def pixels_for(
    images: object, to_pixels: Callable[[Image.Image], Tensor], n: int, height: int, width: int, name: str
) -> Tensor:
    """One image for all or one each → (N, C, H, W) by `to_pixels`; each must have the size that is asked for."""
    single = isinstance(images, Image.Image) or not isinstance(images, Iterable)
    images = one_each([images] if single else list(images), n, name)
    for i, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise ValueError(f"{name}[{i}] must be a PIL image, not {type(image).__name__}.")
    images = [to_rgb(image) for image in images]  # turns them upright, which may swap their sides
    for i, image in enumerate(images):
        if image.size != (width, height):
            raise ValueError(
                f"{name}[{i}] is {image.width}×{image.height}, but the image asked for is {width}×{height}: "
                "resize it (images.fit does), or ask for its own width and height."
            )
    return torch.stack([to_pixels(image) for image in images])


def check_tensor(tensor: Tensor, shape: tuple[int | None, ...], name: str) -> None:
    """Checks that the tensor has this shape (None = any length but 0) and only finite numbers."""
    fits = tensor.ndim == len(shape) and all(
        have == want if want is not None else have > 0 for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"{name} must be a tensor of shape ({wanted}), not {tuple(tensor.shape)}.")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds numbers that are not finite.")
