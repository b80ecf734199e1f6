"""Make a few-shot task out of a run's held-out documents: which domain is a text of?"""

import sys

from cbtm_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "make_fewshot_task"))
