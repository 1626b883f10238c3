"""The order of convergence that each deterministic sampler claims by default; test_samplers.py measures it.

One table per module of samplers. One that draws noise is in STOCHASTIC instead; a member in neither fails by name.
"""
SINGLE_STEP = {'ddim': 1, 'heun': 2}
MULTISTEP = {'dpmpp_2m': 2}
ADAPTIVE = {}
ORDER = SINGLE_STEP | MULTISTEP | ADAPTIVE

STOCHASTIC_SINGLE_STEP = {'ancestral'}
STOCHASTIC_MULTISTEP = set()
STOCHASTIC_ADAPTIVE = set()
STOCHASTIC = STOCHASTIC_SINGLE_STEP | STOCHASTIC_MULTISTEP | STOCHASTIC_ADAPTIVE
