"""Continue one prompt with a finished run's experts, without a server; the text appears as it is generated."""

import signal
import sys

from cbtm_ray.decode.generate import main

if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it as it ends any other tool
    sys.exit(main(__doc__))
