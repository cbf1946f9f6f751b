"""``python -m octavo`` is the ``octavo`` command. Owns nothing but that sentence."""

import sys

from octavo.cli import main

sys.exit(main())
