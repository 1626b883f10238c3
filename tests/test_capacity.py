"""Laws of the batch that fits: it does, twice as many would not, few programs are compiled, and no image changes."""
import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from conftest import tiny_config

from diffusion_jax import capacity, evaluate, sample
from diffusion_jax import model as model_lib
from diffusion_jax.generator import Generator
from diffusion_jax.previews import Previews
from diffusion_jax.runtime import command, memory, sharding
from diffusion_jax.runtime.config import Config


@dataclasses.dataclass
class Machine:
  """Stands for a Generator whose program takes `fixed` bytes and `each` for a sample on a device, of `has` there."""
  lanes: int
  has: float
  fixed: int
  each: int
  refuses: float = np.inf  # what the compiler does, for more bytes than these, instead of saying how many
  batch_size: int = 0
  compiled: list = dataclasses.field(default_factory=list)

  def __post_init__(self):
    self.mesh = types.SimpleNamespace(shape={'data': self.lanes, 'fsdp': 1}, local_devices=jax.devices()[:self.lanes])

  def resized(self, size):
    return dataclasses.replace(self, batch_size=size)

  def bytes(self, size):
    return self.fixed + self.each * size // self.lanes

  def compile(self, params):
    self.compiled.append(self.batch_size)
    if self.bytes(self.batch_size) > self.refuses:
      raise capacity.TooLarge('refused')
    measured = types.SimpleNamespace(argument_size_in_bytes=0, output_size_in_bytes=0,
                                     temp_size_in_bytes=self.bytes(self.batch_size))
    return types.SimpleNamespace(memory_analysis=lambda: measured)


@pytest.fixture(params=['cpu', 'elsewhere'])
def most(request, monkeypatch):
  monkeypatch.setattr(capacity, 'USABLE', 1.0)
  monkeypatch.setattr(capacity, 'MOST', capacity.MOST if request.param == 'cpu' else {})
  return capacity.MOST['cpu'] if request.param == 'cpu' else capacity.MOST_ELSEWHERE


@pytest.mark.parametrize('lanes', [1, 2, 8])
@pytest.mark.parametrize('fixed', [0, 300])
@pytest.mark.parametrize('refuses', [False, True])
def test_the_batch_fits_and_is_as_large_as_is_known_to(lanes, fixed, refuses, most, monkeypatch):
  for has in (110, 1000, 7000, 10 ** 4, 10 ** 5, 10 ** 9):
    monkeypatch.setattr(memory, 'limit', lambda device, sharing, has=has: has)
    for wanted in (1, 5, 64, 100, 1000, 50_000):
      machine = Machine(lanes, has, fixed, 100, has if refuses else np.inf)
      if machine.bytes(lanes) > has:
        with pytest.raises(capacity.TooLarge, match='one sample'):
          capacity.fitted(machine, {}, wanted)
        continue
      found = capacity.fitted(machine, {}, wanted)
      size = found.batch_size
      all_of_them = min(-(-wanted // lanes), most) * lanes
      assert machine.bytes(size) <= has and size % lanes == 0 and 0 < size <= all_of_them
      assert size in machine.compiled  # no program besides is compiled afterwards
      first = machine.bytes(machine.compiled[0]) <= has
      if first:
        assert len(machine.compiled) == len(set(machine.compiled)) <= 2
      if size < all_of_them:
        assert size // lanes & (size // lanes - 1) == 0  # a power of two
        in_proportion = machine.bytes(machine.compiled[0]) * 2 * size / machine.compiled[0]
        assert not first or in_proportion > has


def test_what_lies_beside_is_counted(monkeypatch):
  monkeypatch.setattr(memory, 'limit', lambda device, sharing: 64_000 / capacity.USABLE + 1)
  assert capacity.fitted(Machine(1, 0, 0, 1000), {}, 64).batch_size == 64
  assert capacity.fitted(Machine(1, 0, 0, 1000), {}, 64, held=30_000).batch_size == 32


def test_more_than_in_proportion_leaves_the_first_program(monkeypatch):
  monkeypatch.setattr(capacity, 'MOST', {})
  monkeypatch.setattr(memory, 'limit', lambda device, sharing: 10 ** 6)
  machine = Machine(1, 0, 0, 1000)
  monkeypatch.setattr(Machine, 'bytes', lambda self, size: 100_000 if size == 64 else 10 ** 7)
  assert capacity.fitted(machine, {}, 1000).batch_size == 64 and machine.compiled == [64, 512]


def test_a_batch_that_is_given_is_taken():
  machine = Machine(1, 0, 0, 1000, batch_size=7)
  assert capacity.fitted(machine, {}, 64) is machine and not machine.compiled


@pytest.fixture(scope='module')
def drawn():
  """(model, parameters, mesh, draw(batch_size, most) -> (images of 0 to 11, the batch))."""
  model, mesh = model_lib.make(tiny_config(), (8, 8, 1), 10), sharding.make_mesh(2, 1)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32),
                        jax.eval_shape(model.init, jax.random.key(0)))
  params = jax.device_put(params, sharding.replicated(mesh))

  def draw(batch_size):
    generator = Generator(model, Config({**model.config.sample, 'batch_size': batch_size}), 0, mesh)
    return capacity.fitted(generator, params, 12)

  return model, params, mesh, draw


def test_images_are_those_of_any_batch(drawn, monkeypatch):
  """Of all at once, of a fixed batch, and of a machine that has memory for a few."""
  _, params, _, make = drawn
  ids, labels = range(12), sample.labels_of(range(12), 10)
  fixed, free = make(4), make(0)
  expected = fixed.draw(params, ids, labels)
  assert (fixed.batch_size, free.batch_size) == (4, 12)
  needs = capacity._needs(free.compile(params), params)
  monkeypatch.setattr(memory, 'limit', lambda device, sharing: (
      0.6 * needs + memory.device_bytes(params)) / capacity.USABLE)
  small = make(0)
  assert small.batch_size in (2, 4)
  for generator in (free, small):
    assert np.abs(generator.draw(params, ids, labels).astype(int) - expected).max() <= 1
  assert len(np.unique(expected.reshape(12, -1), axis=0)) == 12


@pytest.mark.parametrize('compiled', [False, True])
def test_a_batch_that_is_refused_gets_one_sentence(drawn, compiled, monkeypatch):
  _, params, _, make = drawn
  generator = make(12)
  with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'), capacity.explained(generator, params):
    raise jax.errors.JaxRuntimeError('INTERNAL: something else')
  program = generator.compile(params) if compiled else None
  if compiled:
    monkeypatch.setattr(memory, 'limit', lambda device, sharing: (
        capacity._needs(program, params) / 5 + memory.device_bytes(params)) / capacity.USABLE)
  with pytest.raises(capacity.TooLarge) as caught, capacity.explained(generator, params, program):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nMore.')
  assert str(caught.value) == (f'a batch of 12 does not fit in the memory of 2 devices: take --batch_size='
                               f'{2 if compiled else 4}, or --batch_size=0 for the largest that fits')


def test_xla_refuses_a_batch_with_that_error(drawn, tmp_path):
  """The words that are looked for are those of this version of XLA."""
  with pytest.raises(jax.errors.JaxRuntimeError, match='RESOURCE_EXHAUSTED'):
    jax.block_until_ready(jax.jit(lambda: jax.numpy.ones((2 ** 22, 2 ** 22)))())


def test_pictures_are_drawn_in_as_many_batches_as_it_takes(drawn, tmp_path, monkeypatch):
  """Beside the state of training there is memory for half of the 64."""
  mesh = drawn[2]

  def make(batch_size):
    model = model_lib.make(tiny_config(sample__batch_size=batch_size, sample__steps=2), (8, 8, 1), 10)
    return model, Previews(model, mesh, tmp_path)

  model, fixed = make(64)
  state = jax.jit(lambda: model_lib.initial_state(model, model_lib.optimizer_of(model.config), jax.random.key(0)))()
  expected = fixed.write(state, 0).astype(int)
  needs = capacity._needs(fixed.generator.compile(state.params), state.params)
  monkeypatch.setattr(memory, 'limit', lambda device, sharing: (
      memory.device_bytes(state) + 0.6 * needs) / capacity.USABLE)
  _, free = make(0)
  found = free.write(state, 0).astype(int)
  assert free.generator.batch_size == 32 and found.shape == expected.shape
  assert np.abs(found - expected).max() <= 1


def test_the_commands_take_it(tiny_run, tmp_path, capsys):
  images = []
  for flag in ('--batch_size=0', '--batch_size=8'):
    assert command.run(sample.main, [f'--workdir={tiny_run}', '--num=12', f'--out={tmp_path}/x.npz', flag]) == 0
    with np.load(tmp_path / 'x.npz') as file:
      images.append(file['image'].astype(int))
  assert np.abs(images[0] - images[1]).max() <= 1
  assert command.run(sample.main, [f'--workdir={tiny_run}', '--batch_size=-1']) == 2
  assert 'config.sample.batch_size must be at least 0, got -1' in capsys.readouterr().err
  assert command.run(evaluate.main, [f'--workdir={tiny_run}', '--num=24', '--ema=main', '--batch_size=0',
                                     '--seed=5']) == 0
  records = [json.loads(line) for line in (tiny_run / 'eval.jsonl').read_text().splitlines()]
  assert {r['batch_size'] for r in records if r['seed'] == 5 and r['metric'] != 'latency_seconds'} == {24}
