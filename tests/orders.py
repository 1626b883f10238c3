"""The order of convergence that each deterministic sampler claims by default; test_samplers.py measures it.

One table per module of samplers. A member that draws noise is in a STOCHASTIC set instead, and must reach the data's
moments; a member that chooses its own steps is in ADAPTIVE, and is measured in test_adaptive.py. One in none fails.
"""
SINGLE_STEP = {'ddim': 1, 'euler': 1, 'flow_euler': 1, 'heun': 2}
STOCHASTIC_SINGLE_STEP = {'ancestral', 'ancestral_learned', 'euler_ancestral', 'lcm', 'predictor_corrector'}

# Each of the first steps has one order more than the one before it: of lms, whose order 4 test_multistep.py measures
# from a fine start, that leaves 3.5. The published third order of dpmpp_3m is 2: see `dpmpp`.
MULTISTEP = {'deis': 3, 'dpm_solver': 2, 'dpmpp': 2, 'dpmpp_2m': 2, 'dpmpp_3m': 2, 'lms': 3.5, 'plms': 2, 'pndm': 2,
             'unipc': 3}
STOCHASTIC_MULTISTEP = {'dpmpp_sde'}

ADAPTIVE = {'dpm_adaptive', 'rk45'}

ORDER = SINGLE_STEP | MULTISTEP
STOCHASTIC = STOCHASTIC_SINGLE_STEP | STOCHASTIC_MULTISTEP
