"""Tokenize the corpus and sort it into its clusters."""

import sys

from cbtm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "partition_corpus"))
