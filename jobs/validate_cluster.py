"""Check files of the cluster launcher and Kubernetes manifests. Nothing is launched, and no account is needed."""

import sys

from cbtm_ray.cluster_files import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
