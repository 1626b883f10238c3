"""Streams of array_record files, and their way to the devices: the same batches whoever reads them, ahead of time."""
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import toy_tfds
from conftest import ROOT, tiny_config

from diffusion_jax import batches as batches_lib
from diffusion_jax.batches import Batches, ahead
from diffusion_jax.data import pipeline, sources
from diffusion_jax.runtime import sharding
from experiments.input_pipeline import run


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  return toy_tfds.prepare(tmp_path_factory.mktemp('tfds'))


@pytest.fixture(scope='module')
def toy(data_dir):
  return sources.load('tfds:toy', data_dir=data_dir)


def joined(source, start, stop, processes, **options):
  """The global batches start .. stop - 1 of 8, put together from what each of several processes reads."""
  streams = [pipeline.stream(source, 5, 8, start, stop, rows=rows, **options)
             for rows in np.split(np.arange(8), processes)]
  return [(np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts]))
          for parts in zip(*streams, strict=True)]


def check_equal(found, expected):
  for (images, labels), (expected_images, expected_labels) in zip(found, expected, strict=True):
    np.testing.assert_array_equal(images, expected_images)
    np.testing.assert_array_equal(labels, expected_labels)


def test_every_record_of_every_shard_is_read_once(data_dir):
  assert len(list(pathlib.Path(data_dir).glob('toy/1.0.0/toy-train.array_record-*-of-00003'))) == 3
  for split, count in toy_tfds.COUNTS.items():
    images, labels = sources.arrays(sources.load('tfds:toy', split, data_dir=data_dir))
    expected = sorted((toy_tfds.pixels(split, i).tobytes(), i % 3) for i in range(count))
    assert sorted(zip([image.tobytes() for image in images], labels.tolist(), strict=True)) == expected


def test_a_part_of_a_split_is_the_start_of_the_whole(data_dir, toy):
  part = sources.load('tfds:toy', 'train[:12]', data_dir=data_dir)
  assert len(part) == 12
  np.testing.assert_array_equal(sources.arrays(part)[0], sources.arrays(toy)[0][:12])


@pytest.mark.parametrize('processes', [1, 2, 4, 8])
def test_a_run_resumes_on_another_number_of_processes(toy, processes):
  """9 steps of 8 go round the 30 records more than twice; steps 4 .. 8 are read by other processes than 0 .. 3."""
  images, labels = sources.arrays(toy)
  order = [pipeline.indices(5, step, 8, 30) for step in range(9)]
  found = joined(toy, 0, 4, 1) + joined(toy, 4, 9, processes, threads=2)
  check_equal(found, [(images[rows], labels[rows]) for rows in order])


def test_a_run_resumes_on_another_number_of_workers(toy):
  check_equal(joined(toy, 2, 6, 1, workers=1), joined(toy, 2, 6, 2))


def batches_of(data_dir, **changes):
  """The batches of a config that streams the toy data over the devices of a mesh."""
  changes = {'data__resident_gib': 0.0} | changes
  config = tiny_config(data__source='tfds:toy', data__data_dir=data_dir, train__batch_size=8, **changes)
  mesh = sharding.make_mesh(data=4, devices=jax.devices()[:4])
  return Batches(config, sources.load('tfds:toy', data_dir=data_dir), mesh)


@pytest.mark.parametrize('per_call', [1, 2])
def test_what_the_step_takes_is_the_global_batch_over_the_mesh(data_dir, toy, per_call):
  images, labels = sources.arrays(toy)
  calls = list(batches_of(data_dir, train__steps_per_call=per_call)(2, 6))
  assert len(calls) == 4 // per_call
  for (found, found_labels), steps in zip(calls, np.arange(2, 6).reshape(-1, per_call), strict=True):
    order = np.stack([pipeline.indices(0, int(step), 8, 30) for step in steps])
    np.testing.assert_array_equal(found, images[order])
    np.testing.assert_array_equal(found_labels, labels[order])
    assert len(found.sharding.device_set) == 4 and found.addressable_shards[0].data.shape[1] == 2


def test_resident_and_streamed_data_make_the_same_batches(data_dir, toy):
  resident = batches_of(data_dir, data__resident_gib=1.0)
  streamed = batches_of(data_dir)
  assert streamed.data is None
  for rows, (images, labels) in zip(resident(0, 5), streamed(0, 5), strict=True):
    np.testing.assert_array_equal(np.asarray(resident.data[0])[np.asarray(rows)], images)
    np.testing.assert_array_equal(np.asarray(resident.data[1])[np.asarray(rows)], labels)


PEER = '''
import sys
import jax
import numpy as np
address, process, data_dir, out = sys.argv[1:]
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(address, 2, int(process))
from diffusion_jax.batches import Batches, open_source
from diffusion_jax.model import default_config
from diffusion_jax.runtime import sharding
config = default_config()
config.data.update({'source': 'tfds:toy', 'data_dir': data_dir})
config.train.batch_size = 8
found = {}
for resident in (0.0, 1.0):
  for name, mesh in {'data': {'data': 4}, 'tensor': {'data': 1, 'tensor': 4}, 'both': {'data': 2, 'tensor': 2}}.items():
    config.data.resident_gib = resident
    batches = Batches(config, open_source(config), sharding.make_mesh(**mesh))
    for step, call in zip(range(4, 7), batches(4, 7)):
      first = call[0] if batches.data is None else call
      held = {shard.index[1].start or 0: shard.data for shard in first.addressable_shards}
      found[f'{resident:g} {name} {step}'] = np.concatenate([held[start] for start in sorted(held)], 1)[0]
np.savez(out, **found)
'''


def test_two_processes_load_the_rows_that_their_devices_hold(data_dir, toy, tmp_path):
  """Two processes of two devices: with the batch over all of them each loads half; over none of them both load all."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  start = lambda i: subprocess.Popen(
      [sys.executable, '-c', PEER, address, str(i), data_dir, str(tmp_path / f'{i}.npz')], cwd=ROOT,
      env=os.environ | {'JAX_NUM_CPU_DEVICES': '2'}, stderr=subprocess.PIPE)
  peers = [start(i) for i in range(2)]
  errors = [peer.communicate(timeout=240)[1] for peer in peers]
  assert [peer.returncode for peer in peers] == [0, 0], errors
  images, _ = sources.arrays(toy)
  first, second = (np.load(tmp_path / f'{i}.npz') for i in range(2))
  for step in range(4, 7):
    order = pipeline.indices(0, step, 8, 30)
    halves = [order[:4], order[4:]]
    for name, parts in {'data': halves, 'tensor': [order, order], 'both': halves}.items():
      for found, part in zip((first, second), parts, strict=True):
        np.testing.assert_array_equal(found[f'1 {name} {step}'], part)
        np.testing.assert_array_equal(found[f'0 {name} {step}'], images[part])


@pytest.mark.parametrize('count', [0, 1, 2, 5, 9])
def test_reading_ahead_changes_nothing_but_when(count):
  taken = []
  items = ahead((taken.append(i) or i for i in range(6)), count)
  assert taken == []
  found = []
  for item in items:
    assert len(taken) == min(item + count + 1, 6)
    found.append(item)
  assert found == list(range(6))
  assert list(ahead(iter(()), count)) == []


def test_batches_are_put_on_the_devices_before_they_are_used(data_dir, monkeypatch):
  put = []
  whole = sharding.put_batch
  monkeypatch.setattr(batches_lib.sharding, 'put_batch', lambda a, *more, **options: put.append(a) or whole(
      a, *more, **options))
  calls = batches_of(data_dir)(0, 20)
  next(calls)
  assert len(put) == 2 * (1 + Batches.AHEAD)  # images and labels
  calls.close()


class Clock:
  """Time that passes when someone sleeps or works."""

  def __init__(self):
    self.now = 0.0

  def sleep(self, seconds):
    self.now += seconds


@pytest.mark.parametrize(('host', 'share'), [(0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (1.25, 0.2), (4.0, 0.75)])
def test_the_stand_in_waits_for_a_host_that_is_slower_than_it(host, share):
  """A host that takes h seconds a batch leaves a device of 1 s a step idle for 1 - 1 / h of the time, if h > 1."""
  clock = Clock()
  device = run.StandIn(1.0, lambda: clock.now, clock.sleep)
  for i in range(420):
    clock.sleep(host)
    device.step()
    if i == 19:
      device.restart()
  assert device.share() == pytest.approx(share, abs=1e-9)
  assert clock.now == pytest.approx(420 * max(host, 1), abs=run.IN_FLIGHT + host)


def test_the_stand_in_counts_the_pause_after_a_record():
  """After each drain the host takes 0.5 s for the next batch, while the device of 1 s a step has nothing to do."""
  clock = Clock()
  device = run.StandIn(1.0, lambda: clock.now, clock.sleep)
  for i in range(1, 101):
    clock.sleep(0.5)
    device.step()
    if i % 10 == 0:
      device.finish()
  assert device.share() == pytest.approx(10 * 0.5 / (100 + 10 * 0.5))


def test_the_benchmark_runs_and_keeps_its_record(tmp_path, capsys):
  from diffusion_jax.runtime import log
  assert run.main(['--sizes=32,64', '--images=24', '--batch_size=8', '--steps=3', '--step_ms=1',
                   f'--out={tmp_path / "out.jsonl"}']) == 0
  found = log.read_lines(tmp_path / 'out.jsonl')
  assert [(r['size'], r['workers'], r['images']) for r in found] == [(32, 0, 24), (64, 0, 24)]
  assert all(0 <= r['share_waiting'] <= 1 and r['images_per_second_alone'] > 0 for r in found)
  assert capsys.readouterr().out.count('% of the time (8 images in 1 ms') == 2


@pytest.mark.parametrize(('flag', 'text'), [
    ('--sizes=48', '--sizes are of 32, 64, got 48'), ('--steps=0', 'at least 1'),
    ('--workers=two', '--workers must be numbers')])
def test_the_benchmark_names_a_bad_flag(flag, text, tmp_path):
  from diffusion_jax.runtime.config import UserError
  with pytest.raises(UserError, match=text):
    run.main([flag, f'--out={tmp_path / "out.jsonl"}'])
