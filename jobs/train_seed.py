"""Train or load the seed model that all experts start from."""

import sys

from cbtm_ray.cli import main
from cbtm_ray.pipeline import run_job

if __name__ == "__main__":
    sys.exit(main(__doc__, lambda run: run_job(run, "train_seed")))
