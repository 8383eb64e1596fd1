"""`python -m repsft_fast` is `repsft`; `torchrun -m repsft_fast train …` is how many ranks start."""

import sys

from repsft_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
