"""Run ``mla-fast`` as ``python -m mla_fast``."""

import sys

from mla_fast.cli import main

sys.exit(main())
