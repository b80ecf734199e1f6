"""Train or load the seed model that all experts start from."""

import sys

from cbtm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "train_seed"))
