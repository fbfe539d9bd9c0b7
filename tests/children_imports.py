"""Imported once by the server that children are forked from: all that a training script needs."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["OMP_NUM_THREADS"] = "1"

import datasets  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import pytest  # noqa: F401
import skimage.metrics  # noqa: F401
import torch._dynamo  # noqa: F401
import transformers.models.clip.modeling_clip  # noqa: F401

import train_clip  # noqa: F401
import train_stable_diffusion  # noqa: F401
import train_vae  # noqa: F401
