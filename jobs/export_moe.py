"""Merge the experts' feed-forward layers into one mixture-of-experts model, and measure it beside the ensemble."""

import sys

from cbtm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "export_moe"))
