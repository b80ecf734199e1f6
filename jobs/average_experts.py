"""Average the experts' parameters into one dense model, and measure it beside the dense control."""

import sys

from cbtm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "average_experts"))
