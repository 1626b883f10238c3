"""Snapshots of averages, and the command that mixes them."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from diffusion_jax import posthoc_ema, sample, train
from diffusion_jax.core import ema
from diffusion_jax.runtime import command, snapshots
from diffusion_jax.runtime.config import Config, UserError, spec

STDS = {'short': 0.05, 'long': 0.1}
CONFIG = Config({'ema': {'main': spec(ema.constant), **{k: spec(ema.power_function, std=v) for k, v in STDS.items()}}})
STEPS, EVERY, BATCH = 640, 20, 16


def tree(x):
  """Parameters of several shapes and types out of values [6]."""
  return {'net': {'kernel': x[:4].reshape(2, 2), 'bias': x[4:5]}, 'process': {'scale': x[5]}}


@pytest.fixture(scope='module')
def walk():
  return (5 + np.cumsum(np.random.default_rng(1).normal(size=(STEPS, 6)), 0)).astype(np.float32)


def tracked_to_the_end(walk, std):
  """The average of width std over the whole walk, in float64, by its weights."""
  edges = (np.arange(STEPS + 1) / STEPS) ** (ema.gamma(std) + 1)
  return np.diff(edges) @ walk


@pytest.fixture(scope='module')
def run(walk, tmp_path_factory):
  """A run folder as training leaves it: 32 snapshots of two averages of a random walk."""
  workdir = tmp_path_factory.mktemp('run')
  rates = {name: ema.power_function(std) for name, std in STDS.items()}
  update = jax.jit(lambda emas, params, step: {
      name: ema.update(emas[name], params, rates[name](step, BATCH)) for name in emas})
  emas = {name: tree(jnp.asarray(walk[0])) for name in STDS}
  for step in range(STEPS):
    emas = update(emas, tree(jnp.asarray(walk[step])), step)
    if (step + 1) % EVERY == 0:
      posthoc_ema.save_snapshot(workdir, CONFIG, {'main': emas['long'], **emas}, (step + 1) * BATCH)
  return workdir


def test_snapshots_are_of_power_functions_alone(run):
  files = sorted(p.name for p in (run / 'snapshots').iterdir())
  images = range(EVERY * BATCH, STEPS * BATCH + 1, EVERY * BATCH)
  assert files == sorted(f'{name}-{n}.safetensors' for name in STDS for n in images)
  found = posthoc_ema.load_snapshots(run)
  assert [(s.images, s.std) for s in found] == [(n, std) for n in images for std in sorted(STDS.values())]
  assert snapshots.Snapshot(found[0].path).shapes == {'net/kernel': (2, 2), 'net/bias': (1,), 'process/scale': ()}


@pytest.mark.parametrize('std', [0.03, 0.05, 0.075, 0.1, 0.15])
def test_the_command_makes_the_average_that_was_not_tracked(run, walk, std, tmp_path, capsys):
  out = tmp_path / 'average.safetensors'
  assert posthoc_ema.main([f'--workdir={run}', f'--std={std}', f'--out={out}']) == 0
  assert f'std {std:g} at {STEPS * BATCH:,} images from 64 snapshots' in capsys.readouterr().out
  got = snapshots.load(out, jax.eval_shape(lambda: tree(jnp.zeros(6))))
  wanted = tree(tracked_to_the_end(walk, std))
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  flat = lambda t: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(t)])
  assert np.linalg.norm(flat(got) - flat(wanted)) < 1e-3 * np.linalg.norm(flat(wanted))


def test_an_earlier_moment_by_default_in_the_run_folder(run):
  images = STEPS * BATCH // 2
  assert posthoc_ema.main([f'--workdir={run}', '--std=0.1', f'--images={images}']) == 0
  got = snapshots.Snapshot(run / 'posthoc' / f'0.1-{images}.safetensors')
  assert {k: float(v) for k, v in got.about.items()} == {'std': 0.1, 'images': images}
  there = snapshots.Snapshot(run / 'snapshots' / f'long-{images}.safetensors')
  for name in there.shapes:
    np.testing.assert_allclose(got[name], there[name], rtol=1e-5)


@pytest.mark.parametrize(('flags', 'message'), [
    (['--std=0.3'], 'std must lie in (0, 0.2887), got 0.3'), (['--std=0'], 'got 0.0'),
    (['--std=0.1', '--images=5'], 'there is no snapshot at 5 images: the nearest of 32 is at 320'),
    (['--std=0.1', '--config.seed=1'], '--config.seed is for train'),
    (['--std=0.1', '--image=320'], "did you mean '--images'"), ([], 'required: --std')])
def test_bad_flags_are_one_sentence(run, flags, message, capsys):
  assert command.run(posthoc_ema.main, [f'--workdir={run}', *flags]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count('\n') == 1


def test_too_few_snapshots_are_one_sentence(tmp_path, capsys):
  for count in (0, 1):
    if count:
      posthoc_ema.save_snapshot(tmp_path, CONFIG, {'long': tree(jnp.ones(6))}, 64)
    assert command.run(posthoc_ema.main, [f'--workdir={tmp_path}', '--std=0.1']) == 2
    error = capsys.readouterr().err
    assert f'at least 2 snapshots, got {count}: train with averages such as' in error and error.count('\n') == 1
  assert command.run(posthoc_ema.main, [f'--workdir={tmp_path / "none"}', '--std=0.1']) == 2
  assert 'there is no run folder' in capsys.readouterr().err


def test_damaged_and_foreign_snapshots_are_named(tmp_path):
  for images in (64, 128):
    posthoc_ema.save_snapshot(tmp_path, CONFIG, {'long': tree(jnp.ones(6))}, images)
  path = tmp_path / 'snapshots' / 'long-128.safetensors'
  whole = path.read_bytes()
  path.write_bytes(whole[:-1])
  with pytest.raises(UserError, match=r'long-128.safetensors. cannot be read'):
    posthoc_ema.load_snapshots(tmp_path)
  snapshots.write(path, {'a': np.ones(3, np.float32)}, {'std': 0.1, 'images': 128})
  with pytest.raises(UserError, match='holds other arrays'):
    posthoc_ema.reconstruct(posthoc_ema.load_snapshots(tmp_path), 128, 0.05)
  with pytest.raises(UserError, match='holds other arrays than this model, first'):
    snapshots.load(path, tree(jnp.ones(6)))
  snapshots.write(path, {'a': np.ones(3, np.float32)}, {'note': json.dumps('no std')})
  with pytest.raises(UserError, match='lacks its std and images'):
    posthoc_ema.load_snapshots(tmp_path)


def test_snapshots_of_parts_on_several_devices_are_whole(tmp_path):
  mesh = jax.make_mesh((4,), ('data',), devices=jax.devices()[:4])
  parts = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  x = jnp.arange(32.0).reshape(8, 4)
  posthoc_ema.save_snapshot(tmp_path, CONFIG, {'long': {'w': jax.device_put(x, parts)}}, 64)
  path = tmp_path / 'snapshots' / 'long-64.safetensors'
  np.testing.assert_array_equal(snapshots.Snapshot(path)['w'], x)
  back = snapshots.load(path, {'w': jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=parts)})['w']
  np.testing.assert_array_equal(back, x)
  assert back.sharding == parts


def test_the_average_that_was_made_can_be_sampled(tmp_path, capsys):
  """Made as wide as one that was tracked, it draws the same images; the other tracked one draws others."""
  config = tiny_config(train__images=256, train__snapshot_every=32)
  config.ema = Config({name: spec(ema.power_function, std=std) for name, std in (('short', 0.05), ('long', 0.1))})
  workdir = tmp_path / 'run'
  assert train.train(config, workdir) == 0
  assert posthoc_ema.main([f'--workdir={workdir}', '--std=0.05']) == 0
  made, images = workdir / 'posthoc' / '0.05-256.safetensors', []
  out = tmp_path / 'x.npz'
  for name in ('short', 'long', made):
    assert command.run(sample.main, [f'--workdir={workdir}', '--num=8', f'--ema={name}', f'--out={out}']) == 0
    with np.load(out) as file:
      images.append(file['image'].astype(int))
  assert np.abs(images[2] - images[0]).max() <= 1 < np.abs(images[1] - images[0]).max()
  capsys.readouterr()
  for flags, words in (([f'--ema={made}', '--step=16'], 'give one of the two'),
                       (['--ema=no.safetensors'], 'cannot be read')):
    assert command.run(sample.main, [f'--workdir={workdir}', *flags]) == 2
    assert words in capsys.readouterr().err
