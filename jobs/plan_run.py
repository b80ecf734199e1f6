"""Print what a run will take: tokens, FLOPs, hours, cost, storage and network bytes. Nothing is started."""

import sys

from cbtm_ray.plan.table import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
