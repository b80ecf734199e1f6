"""Write experts, router, merged model and adapters of a finished run to a folder to publish, with model cards."""

import sys

from cbtm_ray.export.hub import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
