"""ntjax trains language models through a chain of stages, in JAX, from one config file."""

__version__ = "0.1.0"
