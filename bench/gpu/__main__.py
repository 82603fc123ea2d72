"""``python -m bench.gpu``: see bench/gpu/steps.py."""

import sys

from bench.gpu.steps import main

sys.exit(main())
