"""`python -m covidnb.catalog`: the command."""

import sys

from covidnb.catalog import main

if __name__ == "__main__":
    sys.exit(main())
