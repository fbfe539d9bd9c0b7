"""Measurements that the README quotes, each a script that makes them again.

quickstart    which recipe of the `monsters` preset paints best in the same time
"""

import sys

try:
    import diffusers  # noqa: F401
except ModuleNotFoundError:
    sys.exit("error: the benchmarks need diffusers, to compare with: pip install -r tests/requirements.txt")
