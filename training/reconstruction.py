"""How well an autoencoder returns images: PSNR and SSIM, and a sheet to look at."""

from concurrent.futures import ThreadPoolExecutor
from statistics import fmean

import numpy as np
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from images import image_sheet, pixels_to_images
from vae_model import VAE


def to_floats(images: Tensor) -> Tensor:
    """uint8 → float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(pixels: Tensor) -> Tensor:
    """Float in [-1, 1] → uint8."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def reconstruct(vae: VAE, images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) → their reconstructions from the posterior's mean, uint8 on the CPU."""
    device = vae.quant_conv.weight.device
    return torch.cat([to_bytes(vae.decode(vae.encode(to_floats(i.to(device))).mode())).cpu() for i in images.split(4)])


def measure_each(vae: VAE, images: Tensor) -> dict[str, list[float]]:
    """ "psnr" (dB, 100 at most: blank images may come back without an error) and "ssim" (0…1) of the reconstruction of
    each of the uint8 images (N, 3, H, W)."""
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(images.cpu(), reconstruct(vae, images), strict=True)]
    with ThreadPoolExecutor() as pool:
        psnr = list(pool.map(lambda pair: peak_signal_noise_ratio(*pair, data_range=255), pairs))
        ssim = list(pool.map(lambda pair: structural_similarity(*pair, data_range=255, channel_axis=0), pairs))
    return {"psnr": np.minimum(psnr, 100).tolist(), "ssim": np.array(ssim).tolist()}


def measure(vae: VAE, images: Tensor) -> tuple[float, float]:
    """The means of `measure_each`: PSNR and SSIM."""
    psnr, ssim = measure_each(vae, images).values()
    return fmean(psnr), fmean(ssim)


def reconstruction_sheet(vae: VAE, images: Tensor, columns: int = 4) -> Image.Image:
    """Originals (uint8, (N, 3, H, W)) in odd rows, what the VAE makes of them below each."""
    rows = []
    for chunk in images.split(columns):
        rows += [*(chunk.float().cpu() / 255), *(reconstruct(vae, chunk).float() / 255)]
    return image_sheet(pixels_to_images(torch.stack(rows)), columns)
