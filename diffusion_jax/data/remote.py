"""Data in a bucket (gs://BUCKET/FOLDER or s3://BUCKET/FOLDER), read through fsspec.

Images that are objects of their own are read from the bucket whenever they are needed. Files that hold many records
(the shards of TFDS, zip and npz) are copied to this machine once: the order of training is a permutation of the whole
data set, so that the first few batches touch every file, and a copy then costs no more than the reading.
"""
import contextlib
import fcntl
import hashlib
import os
import pathlib
import tempfile
from concurrent import futures

PACKAGES = {'gs': 'gcsfs', 's3': 's3fs'}  # scheme -> what fsspec needs to read it
VERSION = ('generation', 'etag', 'ETag', 'mtime', 'size')  # what tells one content of an object from the next


def is_remote(path):
  """Whether a path or a text names something in a bucket."""
  return '://' in os.fspath(path)


def path(text):
  """The place that `text` names: a pathlib.Path with ~ expanded, or an etils path, with the same methods, in a bucket.

  Raises ValueError, in one sentence, if such an address cannot be read here.
  """
  if not is_remote(text):
    return pathlib.Path(text).expanduser()
  filesystem(text)
  os.environ.setdefault('EPATH_USE_TF', 'false')  # fsspec reads buckets, also where TensorFlow happens to be installed
  from etils import epath
  return epath.Path(text)


def filesystem(path):
  """The fsspec file system of an address in a bucket; ValueError if there is none."""
  import fsspec
  scheme = os.fspath(path).partition('://')[0]
  if scheme not in PACKAGES:
    raise ValueError(f'{path} cannot be read: give a local path, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER.')
  try:
    return fsspec.filesystem(scheme)
  except ImportError as error:
    raise ValueError(f'{path} needs the package {PACKAGES[scheme]}, which is not installed: '
                     f'pip install {PACKAGES[scheme]}.') from error


def read_bytes(path):
  """The content of a file, by one request if it lies in a bucket."""
  return filesystem(path).cat_file(os.fspath(path)) if is_remote(path) else path.read_bytes()


def find(root):
  """Every file below a folder in a bucket, as paths relative to it."""
  with refusals(root):
    found = filesystem(root).find(os.fspath(root))
  top = os.fspath(root).partition('://')[2].rstrip('/') + '/'
  return [name.removeprefix(top) for name in found]


def here(path):
  """A file as it lies on this machine: `path` itself, or the copy of an object in a bucket."""
  return copies(path.parent, [path.name]) / path.name if is_remote(path) else path


def copies(folder, names):
  """A local folder that holds the files `names` of a folder in a bucket; each is copied once, whole or not at all.

  The first name stands for the version of all: if that object changes, another folder is begun. Processes of one
  machine wait for each other. Raises FileNotFoundError if a file is not there.
  """
  system = filesystem(folder)
  with refusals(folder):
    about = system.info(f'{folder}/{names[0]}')
    version = next((str(about[key]) for key in VERSION if about.get(key)), '')
    key = hashlib.sha256(f'{folder}\n{names[0]}\n{version}'.encode()).hexdigest()[:16]
    local = cache() / 'data' / key
    local.mkdir(parents=True, exist_ok=True)
    with open(local / '.lock', 'w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      wanted = [name for name in names if not (local / name).exists()]
      if wanted:
        print(f'copying {len(wanted)} files of {folder} into {local}')
      with futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: _copy(system, f'{folder}/{name}', local / name), wanted))
  return local


def _copy(system, source, target):
  handle, partial = tempfile.mkstemp(prefix=f'.{target.name}.', dir=target.parent)
  os.close(handle)
  try:
    system.get_file(source, partial)
    expected, found = system.info(source)['size'], os.stat(partial).st_size
    if found != expected:
      raise OSError(f'{source} has {expected} bytes and its copy has {found}: start again.')
    os.replace(partial, target)
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(partial)


@contextlib.contextmanager
def refusals(path):
  """Says what is absent or refused in one sentence, where a file system would speak of requests."""
  try:
    yield
  except FileNotFoundError as error:
    raise FileNotFoundError(f'There is nothing at {path}, or no such bucket ({_line(error)}).') from error
  except OSError as error:
    if error.errno:  # of this machine: the disk is full, say
      raise
    raise OSError(f'{path} cannot be read ({_line(error)}): sign in with an account that may read it.') from error


def cache():
  """The folder for downloaded files: $DIFFUSION_JAX_CACHE, else ~/.cache/diffusion_jax."""
  return pathlib.Path(os.environ.get('DIFFUSION_JAX_CACHE') or '~/.cache/diffusion_jax').expanduser()


def _line(error):
  return ' '.join(str(error).split())[:200] or type(error).__name__
