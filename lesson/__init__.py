"""What the notebook `understand_stable_diffusion.ipynb` draws: `figures` (curves, arrows, paths), `unet_figure`."""
