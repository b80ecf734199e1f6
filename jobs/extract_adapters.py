"""Write every expert as a LoRA adapter of the seed, and measure the ensemble's perplexity against the rank."""

import sys

from cbtm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "extract_adapters"))
