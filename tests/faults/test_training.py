"""Faults of the numbers, the clock and the data, and two trainers in one folder."""
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import warnings

import numpy as np
import pytest
import runs
from conftest import tiny_config
from PIL import Image

from diffusion_jax import train
from diffusion_jax.runtime.checkpoint import Broken
from diffusion_jax.runtime.config import UserError


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  return runs.whole(tmp_path_factory.mktemp('faults') / 'whole')


# After step 16, the last before a record and a checkpoint, the loss is still a number; the parameters are not.
@pytest.mark.parametrize(('poisoned', 'error', 'words', 'kept'), [
    (5, train.NotFinite, 'between steps 4 and 8', []),
    (13, train.NotFinite, 'between steps 12 and 16', [8]),
    (16, Broken, 'after step 16 .* parameters are not finite', [8]),
    (17, train.NotFinite, 'between steps 16 and 20', [8, 16])])
def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(tmp_path, poisoned, error, words, kept):
  with pytest.raises(error, match=words) as stopped:
    train.train(runs.tiny(poisoned), tmp_path)
  assert stopped.value.status == 1 and not (tmp_path / 'done.json').exists()
  assert runs.names(tmp_path) == sorted(map(str, kept))


def test_what_was_saved_before_the_loss_was_no_number_continues(tmp_path):
  """With the cause removed, to the bits of a run that never had it."""
  assert train.train(runs.tiny(), tmp_path / 'whole') == 0
  with pytest.raises(Broken):
    train.train(runs.tiny(24), tmp_path / 'poisoned')
  assert train.train(runs.tiny(), tmp_path / 'poisoned', allow_changes=True) == 0
  assert runs.fingerprint(tmp_path / 'poisoned') == runs.fingerprint(tmp_path / 'whole')


def write_images(folder):
  """Forty random images, two of them cut short."""
  rng = np.random.default_rng(0)
  folder.mkdir()
  for i in range(40):
    Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8), 'L').save(folder / f'{i:02}.png')
  for i in 7, 23:
    path = folder / f'{i:02}.png'
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize('resident', [2.0, 0.0], ids=['in memory', 'streamed'])
def test_corrupt_images_are_named_and_passed_over_up_to_a_limit(tmp_path, resident):
  write_images(tmp_path / 'images')
  options = {'data__source': f'folder:{tmp_path}/images', 'data__channels': 1, 'data__resident_gib': resident,
             'net__num_classes': 0, 'train__images': 128, 'train__sample_every': 1280, 'eval__held_out': ''}
  with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    assert train.train(tiny_config(**options), tmp_path / 'run') == 0
  said = ' '.join(str(one.message) for one in said)
  assert '07.png' in said and '23.png' in said
  with pytest.raises(UserError, match=r'\d+\.png.*data\.max_bad') as refused:
    train.train(tiny_config(**options, data__max_bad=1), tmp_path / 'refused')
  assert refused.value.status == 2


CLOCK = r'''
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
#include <sys/time.h>
#include <sys/syscall.h>
#include <unistd.h>
static struct timespec began;
static void __attribute__((constructor)) begin(void) { syscall(SYS_clock_gettime, CLOCK_REALTIME, &began); }
/* An hour behind, and every second another one. */
static void back(struct timespec *t) { t->tv_sec = 2 * began.tv_sec - t->tv_sec - 3600; }
int clock_gettime(clockid_t id, struct timespec *t) {
  int status = syscall(SYS_clock_gettime, id, t);
  if (!status && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) back(t);
  return status;
}
time_t time(time_t *out) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  if (out) *out = t.tv_sec;
  return t.tv_sec;
}
int gettimeofday(struct timeval *tv, void *zone) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  tv->tv_sec = t.tv_sec; tv->tv_usec = t.tv_nsec / 1000;
  return 0;
}
'''


@pytest.fixture
def backwards(tmp_path):
  """The environment of a process whose clock is an hour behind and runs backwards."""
  compiler = shutil.which('cc')
  if not compiler:
    pytest.skip('no C compiler: the clock of a process cannot be turned back')
  (tmp_path / 'clock.c').write_text(CLOCK)
  subprocess.run([compiler, '-shared', '-fPIC', '-o', tmp_path / 'clock.so', tmp_path / 'clock.c'], check=True)
  return {'LD_PRELOAD': str(tmp_path / 'clock.so')}


def test_a_clock_that_goes_back_harms_nothing(whole, backwards, tmp_path):
  """The rest of a run is trained before its beginning: it goes on from the newest step, whatever the files' times."""
  workdir = tmp_path / 'run'
  process = runs.start(workdir)
  runs.wait_for(lambda: len(runs.records(workdir)) >= 8, process)
  process.send_signal(signal.SIGTERM)
  code, _, err = runs.finish(process)
  assert code == 75, err
  began = lambda: json.loads((workdir / 'run.json').read_text())['started']
  first, saved, before = began(), max(map(int, runs.names(workdir))), len(runs.records(workdir))
  os.utime(workdir / 'checkpoints' / str(saved), (0, 0))
  code, _, err = runs.finish(runs.start(workdir, backwards))
  assert code == 0, err
  records = runs.records(workdir)
  assert records[before]['step'] == saved + 4 - saved % 4
  assert began() < first  # the clock was turned back indeed
  assert all(record['images_per_second'] > 0 for record in records)
  seconds = [record['seconds'] for record in records]
  assert seconds == sorted(seconds)
  done = json.loads((workdir / 'done.json').read_text())
  assert min(done['seconds'], done['images_per_second'], done['compile_seconds']) > 0
  assert runs.names(workdir) == ['100', '96'] and runs.fingerprint(workdir) == runs.fingerprint(whole)


def test_a_second_trainer_is_refused_and_the_first_goes_on(whole, tmp_path):
  workdir = tmp_path / 'run'
  first = runs.start(workdir)
  runs.wait_for(lambda: len(runs.records(workdir)) >= 2, first)
  first.send_signal(signal.SIGSTOP)
  code, out, err = runs.finish(runs.start(workdir))
  assert code == 2 and not out
  assert err.count('\n') == 1 and f'host {socket.gethostname()} pid {first.pid} since' in err
  first.send_signal(signal.SIGCONT)
  code, _, err = runs.finish(first)
  assert code == 0 and runs.fingerprint(workdir) == runs.fingerprint(whole), err


def test_a_killed_trainer_does_not_keep_the_folder(whole, tmp_path):
  workdir = pathlib.Path(tmp_path, 'run')
  first = runs.start(workdir)
  runs.wait_for(lambda: runs.records(workdir), first)
  first.kill()
  runs.finish(first)
  code, _, err = runs.finish(runs.start(workdir))
  assert code == 0 and runs.fingerprint(workdir) == runs.fingerprint(whole), err
