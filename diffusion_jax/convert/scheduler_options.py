"""The options of diffusers' schedulers that can be converted, with their defaults, and the values that can be."""
import math

BETAS = {'linear': 'linear', 'scaled_linear': 'scaled_linear', 'squaredcos_cap_v2': 'cosine',
         'sigmoid': 'sigmoid_betas'}
TARGETS = {'epsilon': 'eps', 'sample': 'x0', 'v_prediction': 'v'}
SPREAD = {'use_karras_sigmas': 'karras', 'use_exponential_sigmas': 'exponential', 'use_lu_lambdas': 'uniform_logsnr'}

# The options of each class with its defaults.
CHAIN = {'num_train_timesteps': 1000, 'beta_start': 1e-4, 'beta_end': 0.02, 'beta_schedule': 'linear',
         'trained_betas': None, 'prediction_type': 'epsilon', 'steps_offset': 0, 'timestep_spacing': 'linspace'}
THRESHOLD = {'thresholding': False, 'dynamic_thresholding_ratio': 0.995, 'sample_max_value': 1.0}
CLIP = {'clip_sample': True, 'clip_sample_range': 1.0}
ZERO_SNR = {'rescale_betas_zero_snr': False}
SIGMAS = {'use_karras_sigmas': False, 'use_exponential_sigmas': False, 'use_beta_sigmas': False}
END = {'final_sigmas_type': 'zero'}
SOLVER = {'solver_order': 2, 'lower_order_final': True, 'use_flow_sigmas': False, 'flow_shift': 1.0,
          'use_dynamic_shifting': False, 'time_shift_type': 'exponential'}
OPTIONS = {
    'DDPMScheduler': CHAIN | CLIP | THRESHOLD | ZERO_SNR | {'timestep_spacing': 'leading',
                                                            'variance_type': 'fixed_small'},
    'DDIMScheduler': CHAIN | CLIP | THRESHOLD | ZERO_SNR | {'timestep_spacing': 'leading', 'set_alpha_to_one': True},
    'PNDMScheduler': CHAIN | {'timestep_spacing': 'leading', 'set_alpha_to_one': False, 'skip_prk_steps': False},
    'EulerDiscreteScheduler': CHAIN | SIGMAS | ZERO_SNR | END | {
        'interpolation_type': 'linear', 'timestep_type': 'discrete', 'sigma_min': None, 'sigma_max': None},
    'EulerAncestralDiscreteScheduler': CHAIN | ZERO_SNR,
    'HeunDiscreteScheduler': CHAIN | SIGMAS | CLIP | {'beta_start': 0.00085, 'beta_end': 0.012, 'clip_sample': False},
    'LMSDiscreteScheduler': CHAIN | SIGMAS,
    'DPMSolverMultistepScheduler': CHAIN | SIGMAS | THRESHOLD | ZERO_SNR | END | SOLVER | {
        'algorithm_type': 'dpmsolver++', 'solver_type': 'midpoint', 'euler_at_final': False, 'use_lu_lambdas': False,
        'lambda_min_clipped': -math.inf, 'variance_type': None},
    'UniPCMultistepScheduler': CHAIN | SIGMAS | THRESHOLD | ZERO_SNR | END | SOLVER | {
        'solver_type': 'bh2', 'predict_x0': True, 'disable_corrector': [], 'solver_p': None, 'sigma_min': None,
        'sigma_max': None, 'shift_terminal': None},
    'FlowMatchEulerDiscreteScheduler': SIGMAS | {
        'num_train_timesteps': 1000, 'shift': 1.0, 'use_dynamic_shifting': False, 'base_shift': 0.5, 'max_shift': 1.15,
        'base_image_seq_len': 256, 'max_image_seq_len': 4096, 'invert_sigmas': False, 'shift_terminal': None,
        'time_shift_type': 'exponential', 'stochastic_sampling': False},
    'EDMEulerScheduler': END | {'sigma_min': 0.002, 'sigma_max': 80.0, 'sigma_data': 0.5, 'sigma_schedule': 'karras',
                                'num_train_timesteps': 1000, 'prediction_type': 'epsilon', 'rho': 7.0},
}
OLD = {'predict_epsilon'}  # ignored by diffusers too, and False meant something
KNOWN = OLD.union(*OPTIONS.values())
# What can be converted of an option; in each class that has it, or in one.
ONLY = {'beta_schedule': tuple(BETAS)[:3], 'prediction_type': tuple(TARGETS), 'use_beta_sigmas': (False,),
        'timestep_spacing': ('linspace', 'leading', 'trailing'), 'clip_sample_range': (1.0,),
        'interpolation_type': ('linear',), 'timestep_type': ('discrete',), 'use_flow_sigmas': (False,),
        'use_dynamic_shifting': (False,), 'lambda_min_clipped': (-math.inf,), 'shift_terminal': (None,),
        'invert_sigmas': (False,), 'predict_x0': (True,), 'solver_p': (None,), 'skip_prk_steps': (True,),
        'final_sigmas_type': ('zero', 'sigma_min'), 'predict_epsilon': (True,)}
ONLY_OF = {
    'DDPMScheduler': {'beta_schedule': tuple(BETAS),
                      'variance_type': ('fixed_small', 'fixed_small_log', 'fixed_large', 'learned_range')},
    'DDIMScheduler': {'timestep_spacing': ('leading', 'trailing')},  # its "linspace" skips what it visits
    'PNDMScheduler': {'timestep_spacing': ('leading', 'trailing'), 'prediction_type': ('epsilon', 'v_prediction')},
    'EulerAncestralDiscreteScheduler': {'prediction_type': ('epsilon', 'v_prediction')},
    'HeunDiscreteScheduler': {'prediction_type': ('epsilon', 'v_prediction')},
    'DPMSolverMultistepScheduler': {'algorithm_type': ('dpmsolver++', 'sde-dpmsolver++', 'dpmsolver'),
                                    'solver_type': ('midpoint', 'heun'), 'variance_type': (None,),
                                    'use_exponential_sigmas': (False,)},  # it cuts the fractions off its times
    'UniPCMultistepScheduler': {'solver_type': ('bh2', 'bh1'), 'use_exponential_sigmas': (False,)},
    'FlowMatchEulerDiscreteScheduler': {'use_karras_sigmas': (False,), 'use_exponential_sigmas': (False,)},
    'EDMEulerScheduler': {'prediction_type': ('epsilon',), 'sigma_schedule': ('karras', 'exponential'),
                          'final_sigmas_type': ('zero',)},
}
IN_SIGMA = ('EulerDiscreteScheduler', 'EulerAncestralDiscreteScheduler', 'HeunDiscreteScheduler',
            'LMSDiscreteScheduler')
SOLVERS = ('DPMSolverMultistepScheduler', 'UniPCMultistepScheduler')
# The zero SNR of the others' last level is 2^-24.
TO_ZERO = ('DDPMScheduler', 'DDIMScheduler')
# These go to data with a step of their full order; the others' last step is x0 itself.
TO_LITTLE_NOISE = ('PNDMScheduler', 'LMSDiscreteScheduler')
