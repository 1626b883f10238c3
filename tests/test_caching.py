"""Feature caching: the two parts of every U-Net, which calls of a sampler are whole, and images by it."""
import functools
import json
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from nets import Cut, filled, jit, normal, shapes_of

from diffusion_jax import bridge, efficiency, evaluate, programs, sample
from diffusion_jax import model as model_lib
from diffusion_jax import records as records_lib
from diffusion_jax.core import caching, guidance, levels, samplers, schedules
from diffusion_jax.generator import Generator
from diffusion_jax.nets import edm2
from diffusion_jax.nets.text_unet import TextUNet
from diffusion_jax.nets.unet import ADM, DDPMpp, NCSNpp, UNet
from diffusion_jax.runtime import command, log, sharding
from diffusion_jax.runtime import config as config_lib
from diffusion_jax.runtime.config import Config, UserError, build, parse_call, spec
from experiments.throughput import caching as experiment

# The two parts of a network

TINY = {'channels': 8, 'multipliers': (1, 2), 'blocks': 1, 'dropout': 0.0}
FAMILIES = {
    'DDPM': UNet(**TINY, attention=(4,), groups=4, num_classes=3),
    'DDPM++': DDPMpp(**TINY, attention=(4, 8), groups=4, num_classes=3),
    'NCSN++': NCSNpp(**TINY, attention=(4,), groups=4, num_classes=3),
    'ADM': ADM(**TINY, attention=(4,), groups=4, num_classes=3, head_channels=4, variance=True),
    'text': TextUNet(**TINY, groups=4, heads=2, depth=(1, 0), text=5),
    'EDM2': edm2.UNet(**TINY, attention=(4,), num_classes=3, head_channels=4),
}


@pytest.mark.parametrize(('family', 'depth'), list(zip(FAMILIES, (1, 2, 3, 4, 2, 3), strict=True)))
def test_an_outer_call_on_the_deep_feature_of_its_own_input_is_the_whole_call(family, depth):
  net, x, noise = FAMILIES[family], normal(2, 8, 8, 2), np.asarray([0.3, 2.0], np.float32)
  skips = [(8, 8, 8), (8, 8, 8), (4, 4, 8), (4, 4, 16)]
  cond = {'label': np.asarray([0, 2]), 'text': normal(2, 3, 5),
          'control': [normal(2, *shape, seed=i) for i, shape in enumerate([*skips, (4, 4, 16)])]}
  params = filled(jax.eval_shape(net.init, jax.random.key(0), x, noise, cond)['params'])
  call = jit(lambda params, x, deep=None: net.apply({'params': params}, x, noise, cond, depth=depth, deep=deep))
  (F, deep), (other, _) = call(params, x), call(params, x + 0.3)
  assert net.num_skips == 4 and np.abs(F).max() > 0.1
  np.testing.assert_allclose(call(params, x, deep)[0], F, atol=1e-6 * np.abs(F).max())
  # An older feature is near and not the same: both parts of the network are seen.
  mixed, passed = call(params, x + 0.3, deep)
  assert np.abs(mixed - F).max() > 1e-3 and np.abs(mixed - other).max() > 1e-3
  np.testing.assert_array_equal(passed, deep)


@pytest.mark.parametrize('net', [FAMILIES['DDPM'], FAMILIES['EDM2']], ids=type)
def test_a_whole_call_does_what_any_call_does_and_a_network_is_cut_at_its_skip_connections(net):
  x, noise, cond = jnp.zeros((1, 8, 8, 2)), jnp.zeros(1), {'label': jnp.zeros(1, int)}
  params = shapes_of(net, x.shape)
  program = lambda call: str(jax.make_jaxpr(lambda params: call({'params': params}, x, noise, cond))(params))
  assert program(net.apply) == program(lambda *a: net.apply(*a, depth=3)[0])
  for depth in (-1, 5):
    with pytest.raises(ValueError, match=f'must lie in 1 to 4, the skip connections of this network, got {depth}'):
      program(functools.partial(net.apply, depth=depth))


@functools.cache
def flops(net, depth=0, outer=False):
  x, noise = jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
  params = shapes_of(net, x.shape)
  call = lambda params, x, noise, deep=None: net.apply({'params': params}, x, noise, {}, depth=depth, deep=deep)
  deep = [jax.eval_shape(call, params, x, noise)[1]] if outer else []
  return programs.flops(jax.make_jaxpr(call)(params, x, noise, *deep))['float32']


def test_an_outer_call_costs_what_its_layers_cost():
  """Where the levels are alike, the outermost one costs what a network of one level does, but for its middle."""
  make = functools.partial(UNet, channels=8, blocks=1, attention=(), groups=4)
  one, two = make(multipliers=(1,)), make(multipliers=(1, 1))
  pixels, width, embedding = 8 * 8, 8, 32
  blocks = 2 * (2 * 9 * pixels * width ** 2 + embedding * width)
  attention = 4 * pixels * width ** 2 + 2 * pixels ** 2 * width
  assert flops(two, 2, outer=True) == flops(one, 2, outer=True) == flops(one) - 2 * (blocks + attention)
  assert flops(two, 1, outer=True) < flops(two, 2, outer=True)


# The calls of a sampler


def stub(name, calls=None):
  """net(x, noise, depth, deep) -> (F, deep) of arithmetic alone; whole calls are counted when they run."""
  def net(x, noise, depth=1, deep=None):
    if deep is None:
      if calls is not None:
        jax.debug.callback(lambda: calls.append(name))
      deep = jnp.tanh(x[..., :1] * (1 + len(name)) + noise[:, None, None])
    return 0.6 * x + 0.3 * deep, deep
  return net


def remembering(net, every):
  """What caching means, in Python: a net that remembers, for programs that are not traced."""
  state = {'calls': 0, 'deep': None}

  def call(x, noise):
    F, state['deep'] = net(x, noise, deep=None if state['calls'] % every == 0 else state['deep'])
    state['calls'] += 1
    return F
  return call


def stepped(sampler, denoise, x, grid, keys):
  """`solve` as a loop of Python."""
  at, memory = (lambda i: jax.tree.map(lambda a: a[i], grid)), sampler.init(x, len(grid.logsnr))
  draw = lambda i: jax.vmap(lambda key: samplers.independent(key, i, at(i), at(i), x.shape[1:]))(keys)
  for i in range(len(grid.logsnr) - 1):
    x, memory = sampler.step(denoise, x, memory, at(i), at(i + 1), draw(i))
  return sampler.finish(denoise, x, memory, at(-1), draw(len(grid.logsnr) - 1))


GRID = levels.uniform_logsnr()(schedules.cosine(), 8, {})
LOW, HIGH = (float(np.exp(-0.5 * GRID.logsnr[i])) * 1.01 for i in (5, 1))


@pytest.mark.parametrize(('sampler', 'every'), [
    ('ddim(eta=0.5)', 3), ('heun(churn=2.0)', 2), ('dpmpp_2m', 100)])
@pytest.mark.parametrize('limited', [False, True])
def test_every_so_many_calls_of_each_network_are_whole(sampler, every, limited):
  """As a Python loop has it that remembers; two networks under guidance, the second perhaps at some levels alone."""
  sampler = build(parse_call(sampler, samplers))
  x, keys = jnp.asarray(normal(3, 5, 2)), jax.random.split(jax.random.key(3), 3)

  def denoiser(nets, cond):
    first, second = ((lambda x, level, net=net: net(x, jnp.broadcast_to(level.logsnr, x.shape[:1]))) for net in nets)
    guide = lambda d: guidance.cfg(d, second, 2.0)
    return guidance.interval(first, guide, LOW, HIGH, cond) if limited else guide(first)

  calls = []
  cache = caching.Cache(every)
  denoise = denoiser([cache.net(stub('a', calls)), cache.net(stub('bb', calls))], cache.cond)
  found = samplers.solve(cache.sampler(sampler), denoise, x, GRID, keys)
  jax.effects_barrier()
  in_python = lambda pred, yes, no: yes() if pred else no()
  asked = [[], []]
  nets = [remembering(stub(name), every) for name in ('a', 'bb')]
  counted = [lambda x, noise, i=i: asked[i].append(0) or nets[i](x, noise) for i in (0, 1)]
  wanted = stepped(sampler, denoiser(counted, in_python), x, GRID, keys)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
  whole = [-(-len(one) // every) for one in asked]
  assert [calls.count('a'), calls.count('bb')] == whole and len(asked[0]) == sampler.nfe(8)
  assert len(asked[1]) < len(asked[0]) if limited else len(asked[1]) == len(asked[0])
  uncached = denoiser([lambda x, noise, name=name: stub(name)(x, noise)[0] for name in ('a', 'bb')], jax.lax.cond)
  assert np.abs(found - samplers.solve(sampler, uncached, x, GRID, keys)).max() > 1e-3


@pytest.mark.parametrize('name', samplers.__all__)
def test_a_sampler_is_cached_or_refused(name):
  sampler = getattr(samplers, name)()
  refused = {'rk45': 'its own steps', 'dpm_adaptive': 'its own steps'} | dict.fromkeys(
      ('plms', 'pndm', 'predictor_corrector'), 'a loop or a branch of its own')
  if name in refused:
    with pytest.raises(ValueError, match=f'cannot be cached with a sampler that .*{refused[name]}: take another'):
      caching.check(sampler)
  else:
    caching.check(sampler)


# Images


def cut_config():
  config = tiny_config()
  config.net = spec(Cut)
  return config


@pytest.fixture(scope='module')
def cut():
  model = model_lib.make(cut_config(), (8, 8, 1), 10)
  return model, filled(jax.eval_shape(model.init, jax.random.key(0)))


def generator_of(model, devices=1, **settings):
  config = Config({**model.config.sample, 'batch_size': 4, 'steps': 8, 'guidance': 2.0, **settings})
  return Generator(model, config, 0, sharding.make_mesh(devices, 1))


def draw(generator, params, ids=(0, 1, 2, 3, 4)):
  placed, size = jax.device_put(params, sharding.replicated(generator.mesh)), generator.batch_size
  return np.concatenate([generator(placed, ids[i:i + size], ids[i:i + size])
                         for i in range(0, len(ids), size)]).astype(int)


def test_with_1_the_program_is_the_one_without_caching(cut):
  """Whatever the depth is; that it is what it was before there was any, the tests of sampling see."""
  model, params = cut
  params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
  text = lambda **settings: str(generator_of(model, **settings).trace(params).jaxpr)
  assert text(cache_every=1, cache_depth=1) == text() != text(cache_every=2)
  assert 'cond[' not in text() and text(cache_every=2).count('cond[') == 4


def test_a_network_whose_deep_part_is_constant_draws_the_same_images():
  model = model_lib.make(tiny_config(unet=True), (8, 8, 1), 10)
  params = filled(jax.eval_shape(model.init, jax.random.key(0)))
  plain, cached = (generator_of(model, guidance=1.0, cache_every=every, cache_depth=1) for every in (1, 3))
  assert np.abs(draw(cached, params) - draw(plain, params)).max() > 2
  inner = params['net']['up_0_block_0']  # all that it gives is its last bias
  for layer in ('shortcut', 'conv_1'):
    inner[layer]['kernel'] = jnp.zeros_like(inner[layer]['kernel'])
  images = draw(plain, params)
  assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)
  assert np.abs(draw(cached, params) - images).max() <= 1  # rounding of another compiled program


def test_a_sample_does_not_depend_on_its_batch(cut):
  settings = {'cache_every': 3, 'sampler': parse_call('ddim(eta=0.5)', samplers), 'guidance': 1.0}
  model, params = cut
  five = draw(generator_of(model, **settings), params)
  assert len(np.unique(five.reshape(5, -1), axis=0)) == 5
  assert np.abs(draw(generator_of(model, batch_size=1, **settings), params, [3]) - five[3:4]).max() <= 1
  eight = generator_of(model, devices=8, batch_size=8, **settings)
  assert np.abs(draw(eight, params, range(8))[:5] - five).max() <= 1
  assert not programs.collectives(eight.compile(params).as_text(), 8)  # the features of a sample stay by it


@pytest.mark.parametrize('settings', [
    {'sampler': 'ddim'}, {'sampler': 'heun', 'guidance_low': 0.5, 'guidance_high': 4.0}], ids=str)
def test_whole_calls_are_counted(cut, settings):
  settings |= {'sampler': parse_call(settings['sampler'], samplers), 'batch_size': 1}
  called = []

  class Counting(Cut):
    @nn.compact
    def __call__(self, x, noise, cond, train=False, depth=0, deep=None):
      name = 'whole' if deep is None else 'outer'
      jax.debug.callback(lambda: called.append(name))
      return super().__call__(x, noise, cond, train, depth, deep)

  model = cut[0]._replace(net=Counting())
  generator = generator_of(model, cache_every=3, **settings)
  draw(generator, cut[1], [0])
  jax.effects_barrier()
  assert called.count('whole') == generator.whole and len(called) == generator.nfe
  every = generator_of(cut[0], **settings)
  assert every.whole == every.nfe == generator.nfe > generator.whole


def test_a_trajectory_is_the_path_of_the_images(cut):
  model, params = cut
  settings = Config({**model.config.sample, 'batch_size': 4, 'steps': 5, 'cache_every': 2})
  tracer = Generator(model, settings, 0, sharding.make_mesh(1, 1), trajectory=True)
  images, (path, _) = tracer(params, [0, 1], [0, 1])
  assert np.abs(images - draw(generator_of(model, steps=5, guidance=1.0, cache_every=2), params, [0, 1])).max() <= 1
  assert path.shape[:2] == (5, 2)


def test_flops_of_an_image_are_those_of_its_calls(cut):
  model, params = cut
  trained = types.SimpleNamespace(model=model, params=params)
  count = lambda **settings: efficiency.image_flops(
      generator_of(model, **{'steps': 7, 'guidance': 1.0, **settings}), trained)
  whole = count() / 7
  outer = (count(cache_every=2) - 4 * whole) / 3
  assert 0 < outer < 0.8 * whole
  assert count(cache_every=3) == pytest.approx(3 * whole + 4 * outer)
  assert count(cache_every=2, guidance=2.0) == pytest.approx(2 * count(cache_every=2))


@pytest.mark.parametrize(('settings', 'words'), [
    ({'cache_depth': 5}, 'cache_depth: the depth must lie in 1 to 4, the skip connections of this network, got 5'),
    ({'sampler': 'rk45'}, 'cache_every 2: features cannot be cached with a sampler that chooses its own steps'),
    ({'sampler': 'pndm'}, 'cache_every 2: features cannot be cached with a sampler that calls the network in a loop'),
])
def test_what_cannot_be_cached_is_told(cut, settings, words):
  if 'sampler' in settings:
    settings['sampler'] = parse_call(settings['sampler'], samplers)
  with pytest.raises(UserError, match=words):
    generator_of(cut[0], cache_every=2, **settings)


def test_the_commands_say_what_they_cached(cut, tmp_path, capsys):
  """Of a run folder from before there was caching."""
  config = json.loads(config_lib.to_json(cut_config()))
  del config['sample']['cache_every'], config['sample']['cache_depth']
  bridge.save(tmp_path, {'process': {}, **cut[1]})
  log.write_json(tmp_path / 'config.json', config)
  log.write_json(tmp_path / 'data.json', {'shape': (8, 8, 1), 'num_classes': 10, 'class_names': list('0123456789')})
  for flags, words in ((['--cache_every=3', '--cache_depth=1'], '4 network calls each, 2 of them whole, '),
                       ([], '4 network calls each, ')):
    assert command.run(sample.main, [f'--workdir={tmp_path}', '--num=3', '--steps=4', *flags]) == 0
    said = capsys.readouterr().out
    assert words in said and ('whole' in said) == bool(flags)
  for flags in ([], ['--cache_every=2']):
    average = f'--ema={tmp_path}/weights.safetensors'
    assert command.run(evaluate.main, [f'--workdir={tmp_path}', average, '--num=8', '--features=pixels', *flags]) == 0
  records = log.read_lines(tmp_path / 'eval.jsonl')
  plain, cached = ([r for r in records if ('cache_every' in r) == told] for told in (False, True))
  assert len(plain) == len(cached) > 1 and {(r['cache_every'], r['cache_depth']) for r in cached} == {(2, 0)}
  # As many calls, and yet no values that may stand in one row.
  assert len(records_lib.evaluations(records_lib.read_run(tmp_path, 'run'))) == 2


# The experiment


def test_fewer_steps_of_as_much_arithmetic_stand_beside():
  config = cut_config()
  config.sample.steps = 12
  model = model_lib.make(config, (8, 8, 1), 10)
  trained = types.SimpleNamespace(model=model, params=jax.eval_shape(model.init, jax.random.key(0)),
                                  mesh=sharding.make_mesh(1, 1))
  plain, *rows = experiment.rows_of(trained, (1, 2, 3), (0,))
  assert [row.cache_every for row in rows] == [2, 1, 3, 1] and plain.cache_every == 1
  for cached, fewer in (rows[:2], rows[2:]):
    assert cached.steps == plain.steps > fewer.steps
    assert abs(cached.flops - fewer.flops) <= plain.flops / plain.steps / 2  # half a call


def test_psnr_of_images_that_differ_by_one():
  images = np.full((3, 4, 4, 1), 7, np.uint8)
  assert experiment.psnr(images + 1, images) == experiment.psnr(images, images + 1) == pytest.approx(48.1308, abs=1e-4)
  assert experiment.psnr(images, images) == np.inf
