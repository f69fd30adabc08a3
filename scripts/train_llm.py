"""`python scripts/train_llm.py --config FILE`: `python -m ntjax.train` by the name that scripts for PyTorch know."""

from ntjax import errors
from ntjax.train import main

if __name__ == "__main__":
    errors.run(main)
