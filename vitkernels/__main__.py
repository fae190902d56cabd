"""``python -m vitkernels`` is the ``vitkernels`` command."""

import sys

from .cli import main

sys.exit(main())
