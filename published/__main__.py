"""`python -m published FOLDER|FILE|HUB_ID TARGET.pth` writes any published VAE in our own format (`VAE.load`)."""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m published", description=__doc__, allow_abbrev=False)
    parser.add_argument("source", help="a VAE, or a whole model: a folder, a file or an id on the Hugging Face hub")
    parser.add_argument("target", help="the file to write, such as sd_vae.pth; an existing one is not replaced")
    options = parser.parse_args()
    if Path(options.target).exists():
        sys.exit(f"error: {options.target} exists; name another file.")

    from published.whole_models import load_vae  # imported when used: it takes seconds

    try:
        load_vae(options.source).save(options.target)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {options.target}")
