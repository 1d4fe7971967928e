"""``python -m zsseg_rt`` is ``zsseg-rt``, even where the script is not on the path."""

import sys

from zsseg_rt.cli import main

sys.exit(main())
