"""Fit the embedder and the balanced clusters on the corpus sample."""

import sys

from cbtm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "fit_clusters"))
