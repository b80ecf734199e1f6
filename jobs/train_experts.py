"""Train the experts, each on its own cluster, and the dense control."""

import sys

from cbtm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "train_experts"))
