"""The whole check from a shell; an argument names a folder of pages in place of those of ``make book``."""

import sys

from companion.book_check import main

sys.exit(min(main(*sys.argv[1:]), 1))
