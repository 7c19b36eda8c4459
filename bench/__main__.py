"""`python -m bench`, in a checkout: the same as `fastbn bench`."""

import sys

from .cli import main

sys.exit(main(sys.argv[1:]))
