"""Run the whole of C-BTM: every stage in order, skipping what is finished."""

import sys

from cbtm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "run_all"))
