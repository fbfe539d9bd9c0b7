"""`python -m published FOLDER|FILE|HUB_ID [vae_model.pth]` writes any published VAE as our own `vae_model.pth`."""

import sys

from published.whole_models import load_vae

if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m published FOLDER|FILE|HUB_ID [vae_model.pth]")
    target = sys.argv[2] if len(sys.argv) == 3 else "vae_model.pth"
    try:
        load_vae(sys.argv[1]).save(target)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {target}")
