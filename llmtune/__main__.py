"""`python -m llmtune`, and what `accelerate launch -m llmtune` starts."""

import sys

from llmtune.cli import main

if __name__ == "__main__":
    sys.exit(main())
