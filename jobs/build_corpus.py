"""Read, check, count and sample the documents; train or load the tokenizer."""

import sys

from cbtm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "build_corpus"))
