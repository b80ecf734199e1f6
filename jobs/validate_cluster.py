"""Check files of the cluster launcher and Kubernetes manifests. Nothing is launched, and no account is needed."""

import sys

from ops.launcher_check import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
