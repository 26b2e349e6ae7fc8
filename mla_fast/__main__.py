"""``python -m mla_fast``: the same as ``mla-fast``."""

import sys

from mla_fast.cli import main

sys.exit(main())
