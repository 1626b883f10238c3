"""Where a run lies: in a folder of this machine, or in a bucket (gs://BUCKET/FOLDER or s3://BUCKET/FOLDER).

What a bucket holds are objects, each written whole: none is ever seen half-written, none can be appended to, and
there are no folders to be made. Paths in a bucket have the methods of pathlib (etils.epath, through fsspec).
"""
import os
import pathlib
from typing import Any

from diffusion_jax.runtime.config import UserError

PACKAGES = {'gs': 'gcsfs', 's3': 's3fs'}  # scheme -> what fsspec needs for it


def is_remote(path: Any) -> bool:
  """Whether a path or a text names something in a bucket."""
  return '://' in os.fspath(path)


def folder(text: Any) -> Any:
  """The folder that a flag names: a pathlib.Path, or an etils path, with the same methods, in a bucket.

  UserError, before anything is read or written, if the address is of no known kind, its package is not installed, or
  the bucket does not exist or may not be read.
  """
  if not is_remote(text):
    return pathlib.Path(text)
  scheme, _, rest = os.fspath(text).partition('://')
  if scheme not in PACKAGES or not rest.partition('/')[2].strip('/'):
    raise UserError(f'{text!r} is no run folder: give a local path, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER')
  os.environ.setdefault('EPATH_USE_TF', 'false')  # fsspec reads buckets, also where TensorFlow happens to be installed
  import fsspec
  # Other processes write into the same folder (evaluate --watch follows train): a remembered listing would hide it.
  fsspec.config.conf.setdefault({'gs': 'gcs'}.get(scheme, scheme), {})['use_listings_cache'] = False
  try:
    system, bucket = fsspec.filesystem(scheme), rest.partition('/')[0]
  except ImportError as e:
    package = PACKAGES[scheme]
    raise UserError(f'{str(text)!r} needs the package {package}, which is not installed: pip install {package}') from e
  try:
    system.info(bucket)
  except FileNotFoundError as e:
    raise UserError(f'{str(text)!r}: there is no bucket {bucket!r}: create it, or give another') from e
  except Exception as e:
    if not isinstance(e, PermissionError) and getattr(e, 'code', 0) not in (401, 403) and 'Forbidden' not in str(e):
      raise  # of the network: worth another start
    raise UserError(f'{str(text)!r}: the bucket {bucket!r} may not be read ({_line(e)}): sign in with an account that '
                    f'may, by gcloud auth application-default login') from e
  from etils import epath
  return epath.Path(text)


def write(path: Any, data: bytes) -> None:
  """Writes an object whole; UserError, with what the store answered, if it refuses."""
  try:
    path.write_bytes(data)
  except OSError as e:
    raise UserError(f'{str(path)!r} cannot be written ({_line(e)}): the bucket must exist, and your account must be '
                    f'one that may write it') from e


def move(source: Any, target: Any) -> None:
  """Moves a folder; in a bucket every object is copied under its new name, then the old ones are removed."""
  if is_remote(source):
    import fsspec
    system, _ = fsspec.url_to_fs(os.fspath(source))
    system.mv(os.fspath(source), os.fspath(target), recursive=True)
  else:
    source.rename(target)


def _line(error: Exception) -> str:
  return ' '.join(str(error).split())[:200] or type(error).__name__
