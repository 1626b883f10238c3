"""What samples are scored against: the statistics of a data set's features, with where they come from, in one file."""
import hashlib
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from diffusion_jax.metrics.frechet import Moments

__all__ = ['Reference', 'load', 'to_bytes']


class Reference(NamedTuple):
  """Of a split of a data set, as an extractor sees it."""
  about: Mapping[str, Any]        # reference (its name), reference_hash, reference_samples, features, features_hash
  moments: Mapping[str, Moments]  # of each of the extractor's outputs: 'features', 'sfid'
  features: np.ndarray | None     # [N, D] float32, of all images or of a random part; None if only moments are known


def to_bytes(ref: Reference) -> bytes:
  """The reference as the content of a file that `load` reads."""
  arrays = {} if ref.features is None else {'features': np.ascontiguousarray(ref.features, np.float32)}
  for output, (_, mean, cov) in ref.moments.items():
    arrays |= {f'{output}.mean': np.ascontiguousarray(mean), f'{output}.cov': np.ascontiguousarray(cov)}
  about = dict(ref.about) | {'counts': {output: moments.n for output, moments in ref.moments.items()}}
  return safetensors.numpy.save(arrays, metadata={'about': json.dumps(about, sort_keys=True)})


def load(path: str | os.PathLike) -> Reference:
  """The reference in a file: .safetensors as encode writes it, or .npz with mu and sigma as others publish them.

  The .npz of pytorch-fid and guided-diffusion (mu_s and sigma_s are sFID's) do not say how many images of what they are
  of, nor which weights saw them: `about` then names the file and its SHA-256, and the number and the weights are None.
  Raises OSError if the file cannot be read and ValueError if it holds no reference.
  """
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f'there is no reference {path}: make it with diffusion-jax encode')
  try:
    if path.suffix == '.npz':
      return _published(path)
    with safetensors.safe_open(path, 'numpy') as file:
      about = json.loads((file.metadata() or {})['about'])
      arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    counts = about.pop('counts')
    moments = {output: _moments(n, arrays[f'{output}.mean'], arrays[f'{output}.cov']) for output, n in counts.items()}
    features = arrays.get('features')
    if features is not None and (features.ndim != 2 or features.shape[1:] != moments['features'].mean.shape):
      raise ValueError(f'features {list(features.shape)} with a mean {list(moments["features"].mean.shape)}')
    return Reference(about, moments, features)
  except (safetensors.SafetensorError, KeyError, TypeError, AttributeError, ValueError, EOFError, zipfile.BadZipFile,
          zlib.error) as error:
    raise ValueError(f'{path} holds no reference ({type(error).__name__}: {str(error)[:200]}): make it with '
                     f'diffusion-jax encode, or give an .npz with mu and sigma') from error


def _published(path):
  with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
    moments = {'features': _moments(2 ** 31, arrays['mu'], arrays['sigma'])}
    if 'mu_s' in arrays and 'sigma_s' in arrays:
      moments['sfid'] = _moments(2 ** 31, arrays['mu_s'], arrays['sigma_s'])
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  return Reference({'reference': path.name, 'reference_hash': digest, 'reference_samples': None,
                    'features': 'inception', 'features_hash': None}, moments, None)


def _moments(n, mean, cov):
  """Moments of float64, n being a lower bound where nobody says it: no distance depends on the reference's."""
  mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
  if not isinstance(n, int) or n < 2 or mean.ndim != 1 or cov.shape != 2 * mean.shape:
    raise ValueError(f'moments of {n} features with a mean {list(mean.shape)} and a covariance {list(cov.shape)}')
  if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
    raise ValueError('moments that are not finite')
  return Moments(n, mean, cov)
