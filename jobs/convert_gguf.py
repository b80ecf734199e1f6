"""Make a Hugging Face folder of a GGUF file, which holds a model and its tokenizer. Needs gguf and accelerate."""

import sys

from ops.gguf import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
