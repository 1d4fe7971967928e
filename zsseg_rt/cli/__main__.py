"""``python -m zsseg_rt.cli``."""

import sys

from zsseg_rt.cli import main

sys.exit(main())
