"""What every test shares: eight virtual CPU devices, a compilation cache, and exact denoisers."""
import os
import pathlib
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # configs/, experiments/ and launch/ are used from the checkout

import jax  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)
