"""Run folders in a bucket: records there are those of a folder, and what cannot be used is said in a sentence."""
import io
import json
import pathlib
import signal
import subprocess
import sys

import fake_gcs
import numpy as np
import pytest
from conftest import ROOT, tiny_config

from diffusion_jax import evaluate, sample, train
from diffusion_jax.runtime import backend, lock, log, paths
from diffusion_jax.runtime.config import UserError, from_json

gcs = pytest.mark.skipif(not fake_gcs.installed(), reason="needs the extra: pip install -e '.[gcs]'")


@pytest.fixture
def store(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)  # where a path that was taken for a local one would show
  with fake_gcs.serving(monkeypatch, 'runs', 'secret', denied=['secret']) as found:
    yield found
  assert not (tmp_path / 'gs:').exists()


def test_local_folders_stay_what_they_are(tmp_path):
  assert paths.folder(str(tmp_path)) == tmp_path and isinstance(paths.folder('runs/a'), pathlib.Path)
  assert not paths.is_remote('runs/a') and not paths.is_remote(tmp_path) and paths.is_remote('gs://b/r')


@gcs
def test_paths_in_a_bucket_work_as_pathlib_does(store):
  folder = paths.folder('gs://runs/a/b/')
  assert str(folder) == 'gs://runs/a/b' and folder.name == 'b' and paths.is_remote(folder / 'x')
  assert not folder.exists() and not (folder / 'x').exists()
  (folder / 'x').unlink(missing_ok=True)
  log.write(folder / 'x', 'one')
  log.write(folder / 'x', b'two')
  assert folder.is_dir() and (folder / 'x').read_bytes() == b'two' and [p.name for p in folder.iterdir()] == ['x']
  (folder / 'x').unlink()
  assert not (folder / 'x').exists()


@gcs
def test_what_another_process_writes_is_seen(store):
  """As evaluate --watch must: no listing is remembered."""
  folder = paths.folder('gs://runs/a')
  log.write(folder / '1', '')
  assert [p.name for p in folder.iterdir()] == ['1']
  store.put('runs', 'a/2', b'')
  assert sorted(p.name for p in folder.iterdir()) == ['1', '2']


@gcs
def test_records_in_a_bucket_are_those_of_a_folder(store, tmp_path):
  records = [{'step': 1, 'loss': 0.5}, {'step': 2, 'loss': float('nan')}, {'step': 3, 'names': ('a', 'b')}]
  local, remote = tmp_path / 'lines.jsonl', paths.folder('gs://runs/a') / 'lines.jsonl'
  assert log.read_lines(remote) == []
  for path in (local, remote):
    log.append(path, records[0])
    log.append(path, *records[1:])
  assert remote.read_bytes() == local.read_bytes() and log.read_lines(remote) == log.read_lines(local)
  log.write_json(remote.parent / 'config.json', {'seed': 3, 'sizes': [1, 2]})
  assert from_json(remote.parent / 'config.json').seed == 3
  with pytest.raises(UserError, match=r'there is no gs://runs/none/config\.json'):
    from_json(paths.folder('gs://runs/none') / 'config.json')


@gcs
def test_metrics_in_a_bucket_wait_and_are_there_after_flush_and_close(store):
  workdir = paths.folder('gs://runs/a')
  log.append(workdir / 'metrics.jsonl', {'step': 0, 'loss': 9.0})  # of an earlier start
  records = log.Run(workdir)
  before = len(store.requests)
  for step in (1, 2, 3):
    records.metrics({'step': step, 'loss': 1.0})
  assert len(store.requests) == before
  records.image('samples', np.zeros((4, 4, 3), np.uint8), 3)
  records.flush()
  assert [r['step'] for r in log.read_lines(workdir / 'metrics.jsonl')] == [0, 1, 2, 3]
  first = {name: len(store.objects['runs'][name][0]) for name in store.names('runs', 'a/events')}
  assert len(first) == 1
  records.metrics({'step': 4, 'loss': 1.0})
  local = pathlib.Path(records.copied.name)
  records.close()
  records.close()
  assert [r['step'] for r in log.read_lines(workdir / 'metrics.jsonl')] == [0, 1, 2, 3, 4]
  assert {name: len(store.objects['runs'][name][0]) > size for name, size in first.items()} == {next(iter(first)): True}
  assert not local.exists()


@gcs
def test_metrics_are_written_now_and_then_without_being_told(store, monkeypatch):
  records = log.Run(paths.folder('gs://runs/a'))
  records.metrics({'step': 1})
  monkeypatch.setattr(records, 'since', records.since - records.FLUSH_SECONDS - 1)
  records.metrics({'step': 2})
  assert [json.loads(line)['step'] for line in store.objects['runs']['a/metrics.jsonl'][0].splitlines()] == [1, 2]
  records.close()


@gcs
@pytest.mark.parametrize(('text', 'answer'), [
    ('gs://none/run', "'gs://none/run': there is no bucket 'none'"),
    ('gs://secret/run', "'gs://secret/run': the bucket 'secret' may not be read .*Forbidden.*: sign in")])
def test_a_bucket_that_is_absent_or_refuses_is_named_by_every_command(store, text, answer, monkeypatch):
  monkeypatch.setattr(backend, 'prepare', lambda batch_size: None)  # the devices are those of all tests
  for main in (sample.main, evaluate.main, lambda flags: train.main([f'--config={ROOT}/configs/digits.py', *flags])):
    with pytest.raises(UserError, match=answer) as caught:
      main([f'--workdir={text}'])
    assert '\n' not in str(caught.value)


@gcs
def test_a_bucket_that_may_not_be_written_is_named(store):
  folder = paths.folder('gs://runs/a')
  store.denied.add('runs')
  with pytest.raises(UserError, match=r'gs://runs/a/x.* cannot be written .*Forbidden.*may write it') as caught:
    log.write(folder / 'x', 'one')
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('text', ['gs://', 'gs://bucket', 'gs://bucket/', 'ftp://bucket/run', 'file:///tmp/run'])
def test_an_address_that_is_no_run_folder_is_refused(text):
  with pytest.raises(UserError, match='is no run folder: give a local path, gs://BUCKET/FOLDER'):
    paths.folder(text)


@pytest.mark.parametrize(('scheme', 'package'), [('gs', 'gcsfs'), ('s3', 's3fs')])
def test_a_package_that_is_not_installed_is_named(monkeypatch, scheme, package):
  import fsspec

  def absent(scheme):
    raise ImportError('not here')
  monkeypatch.setattr(fsspec, 'filesystem', absent)
  with pytest.raises(UserError, match=f'needs the package {package}, which is not installed: pip install {package}'):
    paths.folder(f'{scheme}://bucket/run')


@gcs
def test_a_folder_is_moved_with_all_that_is_in_it(store, tmp_path):
  for root in (tmp_path / 'a', paths.folder('gs://runs/a')):
    log.write(root / 'x', 'one')
    log.write(root / 'deep' / 'y', 'two')
    paths.move(root, root.with_name('b'))
    assert (root.with_name('b') / 'deep' / 'y').read_bytes() == b'two' and not (root / 'x').exists()
  assert store.names('runs') == ['b/deep/y', 'b/x']


TRAIN = '''
from conftest import tiny_config
from diffusion_jax import train
from diffusion_jax.runtime import paths
train.train(tiny_config(), paths.folder('gs://runs/tiny'))
'''


def lines(path):
  """The records of a run without what depends on the time and the machine."""
  return [{key: r[key] for key in ('step', 'images', 'loss', 'grad_norm')} for r in log.read_lines(path)]


@gcs
def test_a_run_in_a_bucket_that_is_killed_ends_as_one_in_a_folder(store, tiny_run, tmp_path, monkeypatch, capsys):
  """kill -9 while the second checkpoint is uploaded; then to the end, and sampled and evaluated there."""
  monkeypatch.setattr(lock, 'WATCH_SECONDS', 0.5)  # how long a dead trainer's lock is watched
  store.hold = 'checkpoints/16'
  process = subprocess.Popen([sys.executable, '-c', TRAIN], cwd=ROOT / 'tests', stderr=subprocess.PIPE)
  assert store.held.wait(120), process.communicate()
  process.send_signal(signal.SIGKILL)
  process.communicate()
  store.hold = ''
  store.release.set()
  workdir = paths.folder('gs://runs/tiny')
  assert store.names('runs', 'tiny/checkpoints/8/') and not (workdir / 'done.json').exists()

  assert train.train(tiny_config(), workdir) == 0
  assert 'from' not in capsys.readouterr().err
  done = [json.loads((folder / 'done.json').read_text()) for folder in (workdir, tiny_run)]
  assert done[0]['fingerprint'] == done[1]['fingerprint']
  assert {r['step'] for r in lines(workdir / 'metrics.jsonl')} == {r['step'] for r in lines(tiny_run / 'metrics.jsonl')}
  assert lines(workdir / 'metrics.jsonl')[-1] == lines(tiny_run / 'metrics.jsonl')[-1]
  assert train.train(tiny_config(), workdir) == 0 and 'is trained already' in capsys.readouterr().out
  assert len(store.names('runs', 'tiny/samples/')) == 1 and len(store.names('runs', 'tiny/events')) == 2

  assert sample.main(['--workdir=gs://runs/tiny', '--num=8', '--allow=nets', '--out=gs://runs/drawn.npz']) == 0
  assert sample.main([f'--workdir={tiny_run}', '--num=8', '--allow=nets', f'--out={tmp_path / "drawn.npz"}']) == 0
  drawn = np.load(io.BytesIO(store.objects['runs']['drawn.npz'][0]))['image']
  np.testing.assert_array_equal(drawn, np.load(tmp_path / 'drawn.npz')['image'])

  found = []
  for _ in range(2):  # the second finds the samples and the values of the first
    assert evaluate.main(['--workdir=gs://runs/tiny', '--features=pixels', '--num=8', '--allow=nets']) == 0
    found.append(log.read_lines(workdir / 'eval.jsonl'))
  assert found[0] and found[0] == found[1] and 'found in gs://runs/tiny' in capsys.readouterr().out
