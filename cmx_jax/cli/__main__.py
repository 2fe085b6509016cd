"""`python -m cmx_jax.cli`."""

import sys

from cmx_jax.cli import main

sys.exit(main())
