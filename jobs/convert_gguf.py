"""Make a Hugging Face folder of a GGUF file, which holds a model and its tokenizer. Needs gguf and accelerate."""

import sys

from cbtm_ray.gguf_model import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
