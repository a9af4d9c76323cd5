"""``python -m gpu_check``."""

import sys

from gpu_check.driver import main

sys.exit(main())
