"""Laws of training: what must not change a run, what must stop it, and what it leaves behind."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from diffusion_jax import folder, train
from diffusion_jax import model as model_lib
from diffusion_jax import step as step_lib
from diffusion_jax.core import ema
from diffusion_jax.runtime import config as config_lib
from diffusion_jax.runtime import log, sharding
from diffusion_jax.runtime.checkpoint import Checkpoints
from diffusion_jax.runtime.config import UserError, spec


def run_steps(config, mesh, count=4):
  """The state after `count` steps, without records; the params of the start are the same on every mesh."""
  source = train.open_source(config)
  model = model_lib.make(config, source.shape, source.num_classes)
  optimizer = model_lib.optimizer_of(config)
  state = train.initialise(model, optimizer, model_lib.abstract_state(model, mesh))
  metrics = jax.device_put(train.Metrics.empty(), sharding.replicated(mesh))
  batches = train.Batches(config, source, mesh)
  calls = list(batches(0, count))
  step, _ = train.compile_step(model, optimizer, state, metrics, batches.data, calls[0])
  for batch in calls:
    state, metrics = step(state, metrics, batches.data, batch)
  return state, metrics.compute()


def assert_same(a, b, tolerance=1e-5):
  for (name, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=tolerance, atol=tolerance, err_msg=str(name))


# Gradient descent: where a gradient is 0, Adam makes whole steps of rounding.
SGD = {'optimizer': 'sgd', 'net__dropout': 0.1}


@pytest.fixture(scope='module')
def plain():
  """Four steps on one device."""
  return run_steps(tiny_config(**SGD), sharding.make_mesh(1, 1))


def test_several_averages_are_kept_at_once():
  """One that forgets at once is the parameters themselves; one that hardly moves stays near the start."""
  config = tiny_config()
  config.ema.now = spec(ema.constant, decay=0.0, warmup=False)
  config.ema.still = spec(ema.constant, decay=1 - 1e-7, warmup=False)
  state, _ = run_steps(config, sharding.make_mesh(1, 1), 3)
  assert set(state.emas) == {'main', 'now', 'still'}
  assert_same(state.emas['now'], state.params, 1e-6)
  kernel = lambda tree: np.asarray(tree['net']['conv_out']['kernel'])  # zero at the start
  assert np.abs(kernel(state.emas['still'])).max() < 1e-6 * np.abs(kernel(state.params)).max()
  assert np.abs(kernel(state.params) - kernel(state.emas['main'])).max() > 0


@pytest.mark.parametrize('shape', [(5, 1), (4, 6, 3), (2, 3, 4, 1)], ids=str)
def test_half_of_the_images_are_mirrored(shape):
  images = np.random.default_rng(0).integers(0, 256, (400, *shape), np.uint8)
  mirrored = np.asarray(step_lib.mirror(jax.random.key(0), images))
  turned = (mirrored == images[..., ::-1, :]).reshape(400, -1).all(1)
  kept = (mirrored == images).reshape(400, -1).all(1)
  assert np.all(turned | kept)
  assert abs(turned.sum() - 200) < 4 * np.sqrt(400 / 4)


def test_one_device_equals_a_mesh_of_eight(monkeypatch):
  monkeypatch.setattr(sharding, 'MIN_SHARDED_SIZE', 0)
  config = tiny_config(unet=True, **SGD, net__blocks=1, learning_rate__peak=0.1, learning_rate__warmup_images=0)
  plain, (state, values) = (run_steps(config, sharding.make_mesh(*shape)) for shape in ((1, 1), (2, 4)))
  kernel = state.params['net']['conv_in']['kernel']
  assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, None, None, 'fsdp')
  start = model_lib.initial_state(model_lib.make(config, (8, 8, 1), 10), model_lib.optimizer_of(config),
                                  model_lib.key(config.seed, 'init'))
  assert np.abs(kernel - start.params['net']['conv_in']['kernel']).max() > 1e-3  # what is equal has moved
  assert_same(state, plain[0], 2e-5)
  assert_same(values, plain[1], 1e-4)


@pytest.mark.parametrize('changes', [{'train__steps_per_call': 2}, {'data__resident_gib': 0.0}], ids=str)
def test_dispatch_and_storage_change_nothing(plain, changes):
  state, _ = run_steps(tiny_config(**SGD, **changes), sharding.make_mesh(1, 1))
  assert_same(state, plain[0], 1e-6)


def test_accumulation_equals_the_whole_batch():
  changes, mesh = {'optimizer': 'sgd', 'label_dropout': 0.5}, sharding.make_mesh(2, 1)
  whole, parts = (run_steps(tiny_config(train__accumulate=n, **changes), mesh, 2)[0] for n in (1, 2))
  assert_same(parts, whole)


def test_the_seed_changes_the_run_and_repeats_it(plain):
  mesh = sharding.make_mesh(1, 1)
  again, _ = run_steps(tiny_config(**SGD), mesh)
  other, _ = run_steps(tiny_config(**SGD, seed=1), mesh)
  assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), again, plain[0]))
  assert not jnp.allclose(again.params['net']['conv_in']['kernel'], other.params['net']['conv_in']['kernel'])


def test_bfloat16_trains_with_float32_parameters():
  state, values = run_steps(tiny_config(unet=True, net__dtype='bfloat16'), sharding.make_mesh(2, 1), 2)
  assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype('float32')}
  assert np.isfinite(values['loss'])


def test_a_run_leaves_its_records(tiny_run):
  done = json.loads((tiny_run / 'done.json').read_text())
  assert done['images'] == 512
  assert done['images_per_second'] == pytest.approx(512 / done['seconds'])
  assert len(done['fingerprint']) == 64
  records = log.read_lines(tiny_run / 'metrics.jsonl')
  assert [r['images'] for r in records] == [64, 128, 192, 256, 320, 384, 448, 512]
  assert len(records[0]['logsnr_bins']) == len(records[0]['loss_by_logsnr']) + 1
  assert {sum(r['count_by_logsnr']) for r in records} == {64}
  assert records[-1]['loss'] < records[0]['loss']
  assert (tiny_run / 'samples' / '000000512.png').exists()
  assert list(tiny_run.glob('events.out.tfevents.*'))
  schedule = json.loads((tiny_run / 'schedule.json').read_text())
  assert np.all(np.diff(schedule['logsnr']) < 0)
  assert json.loads((tiny_run / 'run.json').read_text())['versions']['jax'] == jax.__version__
  assert Checkpoints(tiny_run).steps() == [24, 32]  # two are kept


def test_loss_by_logsnr_averages_to_the_loss():
  losses, logsnr = jnp.asarray([1.0, 2.0, 6.0, 7.0]), jnp.asarray([-30.0, -0.5, -0.4, 30.0])
  binned = step_lib.Binned.from_model_output(losses=losses, logsnr=logsnr).merge(step_lib.Binned.empty())
  means = np.asarray(binned.compute())
  edges = list(step_lib.BINS)
  assert means[0] == 1
  assert means[-1] == 7
  assert means[edges.index(-2.0)] == 4
  assert np.isnan(means).sum() == len(means) - 3
  assert float(binned.total.sum() / binned.count.sum()) == 4


def test_another_config_is_refused_and_named(tiny_run):
  with pytest.raises(UserError, match=r'learning_rate\.peak: 0\.001 -> 0\.002'):
    train.train(tiny_config(learning_rate__peak=2e-3), tiny_run)
  assert train.train(tiny_config(), tiny_run) == 0  # finished: nothing to do


def test_override_continues_with_another_config(tmp_path):
  assert train.train(tiny_config(train__images=128), tmp_path) == 0
  assert train.train(tiny_config(train__images=256), tmp_path, allow_changes=True) == 0
  assert json.loads((tmp_path / 'done.json').read_text())['images'] == 256
  assert log.read_lines(tmp_path / 'overrides.jsonl')[0]['changed'] == ['train.images: 128 -> 256']


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  """Training blows up after the first checkpoint, which stays as it was."""
  assert train.train(tiny_config(train__images=128), tmp_path) == 0
  with pytest.raises(train.NotFinite, match='between steps 8 and 12') as stopped:
    train.train(tiny_config(train__images=512, learning_rate__peak=1e30), tmp_path, allow_changes=True)
  assert stopped.value.status == 1
  assert Checkpoints(tmp_path).steps() == [8]
  assert not (tmp_path / 'done.json').exists()


@pytest.mark.parametrize(('changes', 'words'), [
    ({'train__batch_size': 12, 'mesh__data': -1}, 'must be a multiple of the 8 devices'),
    ({'mesh__data': 3, 'mesh__fsdp': 3}, 'does not fit on 8 devices'),
    ({'net__num_classes': 7}, 'num_classes is 7, but the data has 10 classes'),
    ({'optimizer': 'adam(b1=2.0)', 'clip_norm': -1.0}, 'clip_norm must be at least 0'),
    ({'learning_rate__decay': 'linear'}, "must be 'constant', 'cosine' or 'inverse_sqrt', got 'linear'"),
])
def test_bad_input_is_refused_before_anything_is_written(tmp_path, changes, words):
  with pytest.raises(UserError, match=words):
    train.train(tiny_config(**changes), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_dry_run_prints_and_writes_nothing(capsys):
  assert train.dry_run(tiny_config()) == 0
  out = capsys.readouterr().out
  for words in ('conv_in/kernel', 'FLOPs of a step', 'memory of a device', 'train state', '16 x (8, 8, 1)'):
    assert words in out


def test_a_run_continues_on_another_machine_without_override(tmp_path):
  """Where it runs may differ, and is recorded; what it computes may not, and is all that the message names."""
  folder.claim(tmp_path, tiny_config(), False)
  folder.claim(tmp_path, tiny_config(mesh__data=2, data__workers=3), False)
  assert config_lib.from_json(tmp_path / 'config.json').mesh.data == 2
  assert log.read_lines(tmp_path / 'overrides.jsonl')[0]['changed'] == ['data.workers: 0 -> 3', 'mesh.data: 1 -> 2']
  with pytest.raises(UserError, match=r'another config \(seed: 0 -> 7\): '):
    folder.claim(tmp_path, tiny_config(mesh__fsdp=2, seed=7), False)
  assert config_lib.from_json(tmp_path / 'config.json').mesh.data == 2
