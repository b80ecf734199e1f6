"""Measure the sparse ensemble against the dense control on held-out documents."""

import sys

from cbtm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "evaluate_mixture"))
