"""``python -m companion.book_check [FOLDER]``."""

import sys

from companion.book_check import main

sys.exit(min(main(*sys.argv[1:]), 1))
