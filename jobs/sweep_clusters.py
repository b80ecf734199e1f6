"""Run the whole method at every number of clusters and every budget of `sweep.clusters` and `sweep.total_tokens`."""

import sys

from cbtm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "sweep_clusters"))
