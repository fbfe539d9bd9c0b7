"""Measurements that the README quotes, each a script that makes them again.

quickstart          which recipe of the `monsters` preset paints best in the same time
what_breaks         what becomes of the images when one line is wrong
compare_diffusers   time and memory against diffusers
scaling             how both grow, and how near a step is to the machine's limit
"""

import os
import sys

# For ours and diffusers in one process, and before diffusers makes the first tensor; see vae_model.py.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

try:
    import diffusers  # noqa: F401
except ModuleNotFoundError:
    sys.exit("error: the benchmarks need diffusers, to compare with: pip install -r tests/requirements.txt")
