"""The entry script: `python run_llm.py --help`."""

import sys

from llm_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
