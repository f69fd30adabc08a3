"""ntjax trains language models through a chain of stages, in JAX, from one config file."""

import os

# transformers says at import that there is no torch, which is as it should be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
