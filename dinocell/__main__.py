"""``python -m dinocell`` is the console script ``dinocell``."""

import sys

from dinocell.cli import main

sys.exit(main())
