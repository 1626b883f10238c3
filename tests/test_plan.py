"""Plans: what is read from programs against closed forms; their memory against the program that training compiles."""
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT, TINY, TINY_NET, tiny_config
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

from diffusion_jax import ahead, plan, programs, topology
from diffusion_jax import model as model_lib
from diffusion_jax.ahead import Program
from diffusion_jax.nets import layers
from diffusion_jax.programs import Collective
from diffusion_jax.runtime import command, sharding
from diffusion_jax.runtime.config import UserError
from diffusion_jax.step import compile_step

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu: the extra tpu')
CHIP = topology.Chip(peak=1, float32=.5, hbm=1, usable=.5, bandwidth=10, links=100, network=2, shapes='', source='')


@pytest.fixture(autouse=True)
def eight_devices():
  """Those of all tests are there before a plan asks for others."""
  assert len(jax.devices()) == 8


def on_mesh(function, *shapes, dtype=jnp.float32, devices=8):
  """The collectives of `function`, mapped over so many devices, of arrays of these local shapes."""
  mesh = jax.make_mesh((devices,), ('i',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])
  mapped = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P('i'), out_specs=P('i'), check_vma=False))
  arguments = [jax.ShapeDtypeStruct((devices * shape[0], *shape[1:]), dtype) for shape in shapes]
  return programs.collectives(mapped.lower(*arguments).compile().as_text(), devices)


def test_collectives_of_a_compiled_program():
  sums = lambda x: jax.lax.psum(x, 'i')
  assert on_mesh(sums, (64, 4)) == [Collective('all-reduce', 'f32', 1, 1024, 2 * 7 * 1024 // 8)]
  assert on_mesh(sums, (64, 4), dtype=jnp.int32, devices=2) == [Collective('all-reduce', 's32', 1, 1024, 1024)]
  gathers = lambda x: jax.lax.all_gather(x, 'i', tiled=True)
  assert on_mesh(gathers, (8, 4)) == [Collective('all-gather', 'f32', 1, 1024, 7 * 1024 // 8)]
  scatters = lambda x: jax.lax.psum_scatter(x, 'i', tiled=True)
  assert on_mesh(scatters, (64, 4)) == [Collective('reduce-scatter', 'f32', 1, 1024, 7 * 1024 // 8)]
  moves = lambda x: jax.lax.ppermute(x, 'i', [(i, (i + 1) % 8) for i in range(8)])
  assert on_mesh(moves, (64, 4)) == [Collective('collective-permute', 'f32', 1, 1024, 1024)]
  [exchange] = on_mesh(lambda x: jax.lax.all_to_all(x, 'i', 0, 0, tiled=True), (64, 4))
  assert exchange == Collective('all-to-all', 'f32', exchange.count, 1024, 7 * 1024 // 8)
  assert on_mesh(lambda x: x + 1, (64, 4)) == []


def test_collectives_in_a_loop_count_as_often_as_it_runs():
  def looped(x):
    inner = lambda x, _: (jax.lax.psum(x, 'i') / 8, None)
    outer = lambda x, _: (jax.lax.scan(inner, x + 1, None, length=3)[0], None)
    return jax.lax.scan(outer, x, None, length=5)[0]
  [reduced] = on_mesh(looped, (64, 4))
  assert (reduced.kind, reduced.count, reduced.bytes) == ('all-reduce', 15, 15 * 1024)


ASYNC = '''HloModule step, is_scheduled=true, num_partitions=16

%wrapped (p: f32[16]) -> f32[1] {
  ROOT %rs = f32[1]{0:T(128)} reduce-scatter(%p), channel_id=9, replica_groups=[1,16]<=[16], dimensions={0}
}

ENTRY %main.1 (a: bf16[4,8], b: f32[16]) -> f32[8] {
  %ag = (bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[16,8]{1,0:T(8,128)S(1)}) all-gather-start(%a), replica_groups=[4,4]<=[16]
  %agd = bf16[16,8]{1,0} all-gather-done(%ag)
  %ar = (f32[3,3]{1,0}, /*index=1*/f32[7]{0}, bf16[8]{0}) all-reduce-start(%x), replica_groups={{0,1},{2,3}}
  %cp = (f32[100]{0}, f32[100]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%b), source_target_pairs={{0,1}}
  %as = ((f32[16]{0}), f32[1]{0}, s32[]) async-start(%b), calls=%wrapped
  ROOT %f = f32[8]{0} fusion(%agd), kind=kLoop, calls=%other, metadata={op_name="jit(f)/all-reduce"}
}
'''


def test_collectives_that_begin_and_end_apart_count_once():
  assert sorted(programs.collectives(ASYNC, 16)) == [
      Collective('all-gather', 'bf16', 1, 256, 192), Collective('all-reduce', 'bf16', 1, 16, 16),
      Collective('all-reduce', 'f32', 1, 64, 64),
      Collective('collective-permute', 'f32', 1, 400, 400), Collective('reduce-scatter', 'f32', 1, 64, 60)]


def counted(function, *shapes, dtype=jnp.float32):
  return programs.flops(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)))


def test_flops_of_products_and_loops():
  assert counted(jnp.dot, (3, 5), (5, 7)) == {'float32': 2 * 3 * 5 * 7}
  assert counted(jnp.dot, (3, 5), (5, 7), dtype=jnp.bfloat16) == {'bfloat16': 2 * 3 * 5 * 7}
  assert counted(lambda x: jnp.sin(x) + x, (3, 5)) == {}
  loss = lambda x, w: jnp.sum(jnp.sin(x @ w))
  assert counted(jax.grad(loss, (0, 1)), (3, 5), (5, 7)) == {'float32': 3 * 2 * 3 * 5 * 7}
  powers = lambda x: jax.lax.scan(lambda y, _: (jax.jit(jnp.dot)(y, x), None), x, None, length=6)[0]
  assert counted(powers, (4, 4)) == {'float32': 6 * 2 * 4 ** 3}
  chosen = lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x)
  assert counted(chosen, (4, 4)) == {'float32': 2 * 2 * 4 ** 3}


def test_flops_of_convolutions_are_the_same_for_both_gradients():
  def convolve(x, kernel, stride):
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  for stride, out in ((1, 8), (2, 4)):
    forward = 2 * 2 * out ** 2 * 6 * 3 * 3 * 5
    assert counted(functools.partial(convolve, stride=stride), (2, 8, 8, 5), (3, 3, 5, 6)) == {'float32': forward}
    loss = lambda x, kernel, stride=stride: jnp.sum(jnp.sin(convolve(x, kernel, stride)))
    assert counted(jax.grad(loss, (0, 1)), (2, 8, 8, 5), (3, 3, 5, 6)) == {'float32': 3 * forward}


def test_what_is_traced_is_what_the_platform_would_trace():
  conv = layers.Conv(64)
  x = jax.ShapeDtypeStruct((1, 16, 16, 64), jnp.float32)
  params = jax.eval_shape(conv.init, jax.random.key(0), x)
  names = lambda: str(jax.make_jaxpr(lambda p, x: conv.apply(p, x))(params, x))
  with topology.as_if_on('tpu'):
    assert 'conv_general_dilated' in names()
  assert 'conv_general_dilated' not in names() and jax.default_backend() == 'cpu'


@functools.cache
def planned_and_trained(**mesh):
  """(what is planned, the train state, the step that training compiles), of a tiny net on eight devices."""
  config = tiny_config(**{f'mesh__{axis}': size for axis, size in mesh.items()})
  model, mesh = ahead.model_on(config, jax.devices())
  planned = ahead.compile_program(*ahead.step_on(model, mesh, 'cpu'), mesh.size)
  _, state, metrics, _, batch = ahead.step_arguments(model, mesh)
  steps, _ = compile_step(model, model_lib.optimizer_of(config), state, metrics, None, batch)
  return planned, state, steps.compiled


@pytest.mark.parametrize('mesh', [{'data': 8}, {'data': 2, 'fsdp': 4}])
def test_memory_and_collectives_are_those_of_the_program_that_training_compiles(mesh, monkeypatch):
  monkeypatch.setattr(sharding, 'MIN_SHARDED_SIZE', 64)  # nothing of a tiny net would be divided
  planned, state, compiled = planned_and_trained(**mesh)
  measured, rows = compiled.memory_analysis(), dict(planned.memory)
  assert rows['total'] == (measured.argument_size_in_bytes + measured.output_size_in_bytes
                           - measured.alias_size_in_bytes + measured.temp_size_in_bytes)
  assert sum(size for name, size in planned.memory if name != 'total') == rows['total']
  local = lambda tree: sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))
  assert rows['parameters'] == local(state.params) and rows['averages'] == local(state.emas)
  assert rows['activations'] == measured.temp_size_in_bytes > 0
  assert planned.collectives == programs.collectives(compiled.as_text(), 8)
  whole = sum(a.size * 4 for a in jax.tree.leaves(state.params))
  assert (rows['parameters'] < whole) == ('fsdp' in mesh)
  assert any(c.kind == 'all-gather' for c in planned.collectives) == ('fsdp' in mesh)


def test_a_gradient_is_reduced_once_over_the_data_axis():
  planned, state, _ = planned_and_trained(data=8)
  num_bytes = sum(a.size * 4 for a in jax.tree.leaves(state.params))
  reduced = sum(c.bytes for c in planned.collectives if c.kind == 'all-reduce' and c.dtype == 'f32')
  assert num_bytes <= reduced < num_bytes + 2 ** 12  # the records besides


def test_microbatches_cost_no_flops():
  def flops_of(accumulate):
    model, mesh = ahead.model_on(tiny_config(train__accumulate=accumulate), jax.devices()[:1])
    return programs.flops(ahead.step_on(model, mesh, 'tpu')[0].jaxpr)
  assert flops_of(1) == flops_of(4)


def test_a_sampler_costs_a_network_for_every_evaluation():
  def flops_of(steps, **changes):
    model, mesh = ahead.model_on(tiny_config(sample__steps=steps, mesh__data=2, **changes), jax.devices()[:2])
    traced, _, generator = ahead.sampler_on(model, mesh, 'cpu')
    return programs.flops(traced.jaxpr)['float32'], generator.nfe
  (few, nfe), (many, more) = flops_of(4), flops_of(12)
  assert few / nfe == many / more and more > nfe
  assert flops_of(4, sample__guidance=2.)[0] == 2 * few
  planned = plan.plan(tiny_config(mesh__data=2), topology.describe('cpu:2'), 'sampler')['sampler']
  memory = planned['memory']
  assert memory['total'] == sum(memory.values()) - memory['total'] and planned['flops'] == {'float32': few}
  assert planned['batch_size'] == 8 and not planned['collectives']  # each device has samples of its own


def pod(chips=4, devices=4, platform='tpu'):
  return topology.Topology('test', platform, CHIP, chips, [None] * devices)


def program(**changes):
  return Program(**{'memory': [('parameters', 100), ('batch', 10), ('activations', 30), ('total', 140)],
                    'flops': {'bfloat16': 4e12}, 'flops_by_xla': 0., 'bytes_accessed': 2e10,
                    'collectives': [Collective('all-reduce', 'f32', 1, 10 ** 11, 3 * 10 ** 11)], 'compile_seconds': 1.,
                    **changes})


def test_a_roofline_is_the_largest_of_its_parts():
  assert plan.roofline(program(), pod()) == {'compute': 1., 'hbm': 2., 'links': 3., 'at_best': 3.,
                                             'one_after_another': 6.}
  assert plan.roofline(program(flops={'float32': 4e12}), pod())['compute'] == 2
  halves = plan.roofline(program(), pod(chips=4, devices=8))  # a device is half a chip, and has half of the work
  assert (halves['compute'], halves['hbm'], halves['links']) == (1, 4, 6)
  spread = plan.roofline(program(), pod(chips=16, devices=16, platform='cuda'))
  assert spread['links'] == 150  # over the network between nodes


def test_the_largest_batch():
  small, large = program(), program(memory=[('activations', 0), ('total', 160)])
  assert plan.largest_batch(small, None, (4, 8), 2, 180) == 8        # 10 bytes an image, as if all of it grew
  assert plan.largest_batch(small, large, (4, 8), 2, 180) == 12      # 5 bytes an image, by the line
  assert plan.largest_batch(small, large, (4, 8), 8, 180) == 8       # a multiple of the devices that share it
  assert plan.largest_batch(small, None, (4, 8), 2, 60) == 0         # the state alone does not fit


def test_a_plan_of_step_and_price_holds_together():
  two = topology.Topology('test', 'cpu', CHIP, 2, jax.devices()[:2])
  config = tiny_config(mesh__data=2)
  found = {'config': 'tiny'} | plan.plan(config, two, 'step', price=3, twice=True)
  step, (low, high) = found['step'], found['run']['hours']
  assert found['steps'] == 32 and found['run']['price'] == [low * 2 * 3, high * 2 * 3]
  assert low * 3600 == pytest.approx(32 * step['seconds']['at_best']) and 0 < low < high
  assert step['fits'] and step['share_of_hbm'] == step['memory']['total'] / 2 ** 30
  assert found['largest_batch_by'] == 'two compiled programs' and found['largest_batch'] > 1000
  # The batch that is said to fill half a GiB does.
  larger = plan.plan(tiny_config(mesh__data=2, train__batch_size=found['largest_batch']), two, 'step')
  assert larger['step']['memory']['total'] == pytest.approx(2 ** 29, rel=.1)
  text = '\n'.join([plan.heading(found), *plan.lines_of(found, 'step')])
  for words in ('at best', 'by the line through two compiled programs', 'its price', 'fits', 'float32 100.0%'):
    assert words in text


@pytest.mark.parametrize(('text', 'words'), [
    ('v7x', "no topology 'v7x'"), ('v7x:2x2', 'did you mean tpu7x'), ('v5e-16', "'v5e-16'; did you mean v5e"),
    ('junk', 'write v5e:4x4, v5p:2x2x4, h100:8 or cpu:16'), ('', "no topology ''"),
    ('v5e:16', 'the 2 sides of a slice: 2x2'),
    ('v5p:4x4', 'the 3 sides of a slice'), ('v5e:0x4', 'cannot be read'), ('v5e:4x', 'cannot be read'),
    ('h100', 'a number of devices'), ('h100:12', 'a multiple of 8'), ('cpu:2x2', 'a number of devices'),
    ('cpu:99', 'ask in a process of its own')])
def test_a_topology_that_does_not_exist_is_refused_in_one_sentence(text, words):
  with pytest.raises(UserError) as error:
    topology.describe(text)
  assert words in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(('message', 'words'), [
    ('ABORTED: Internal error when accessing libtpu multi-process lockfile. Run "$ sudo rm /tmp/libtpu_lockfile".',
     'another process on this machine uses libtpu'),
    ('JAX TPU support not installed; cannot generate TPU topology.', "pip install -e '.[tpu]'"),
    ('INVALID_ARGUMENT: not divisible', 'libtpu knows no v5e:3x3: slices of v5e are 2x2, 2x4')])
def test_errors_of_libtpu_are_sentences(monkeypatch, message, words):
  def fail(*_, **__):
    raise RuntimeError(message)
  monkeypatch.setattr(topologies, 'get_topology_desc', fail)
  with pytest.raises(UserError, match=words.replace('[', r'\[')):
    topology.describe('v5e:3x3')


@pytest.mark.parametrize('flags', [
    ['--mesh=data'], ['--mesh=depth=2'], ['--mesh=data=2x'], ['--mesh=data=2,fsdp=2'], ['--mesh=data=3'],
    ['--price=-1'], ['--slices=2'], ['--config.train.batch_size=12', '--mesh=data=8']])
def test_bad_flags_are_one_sentence(flags, capsys):
  overrides = [f'--config.{k}={v}' for k, v in TINY.items() if k != 'mesh.data']
  arguments = [f'--config={ROOT}/configs/digits.py', '--topology=cpu:8', *overrides, *flags]
  assert command.run(plan.main, arguments) == 2
  err = capsys.readouterr().err
  assert err.startswith('error: ') and err.count('\n') == 1


def test_the_command_plans_for_more_devices_than_there_are(tmp_path):
  overrides = [f'--config.{k}={v}' for k, v in (TINY | TINY_NET).items() if k != 'mesh.data']
  environment = {**os.environ, 'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=2'}
  done = subprocess.run(
      [sys.executable, '-m', 'diffusion_jax.cli', 'plan', '--config=configs/digits.py', '--topology=cpu:16',
       '--mesh=data=4,fsdp=4', '--only=step', f'--json={tmp_path}/plan.json', *overrides],
      cwd=ROOT, capture_output=True, text=True, env=environment, timeout=400)
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / 'plan.json').read_text())
  assert (found['devices'], found['mesh']['fsdp'], found['batch_per_device']) == (16, 4, 1)
  for words in ('train step: 16 images, 1 on a device', 'all-reduce f32', 'data=4, fsdp=4',
                'Virtual devices have no speed'):
    assert words in done.stdout
  assert found['step']['flops']['float32'] > 0 and 'fits' not in found['step']


@needs_libtpu
def test_a_plan_for_tpus_agrees_with_libtpu():
  config = tiny_config(mesh__data=-1, train__batch_size=16)
  pod = topology.describe('v5e:2x2')
  assert (pod.chips, len(pod.devices), pod.platform) == (4, 4, 'tpu')
  model, mesh = ahead.model_on(config, pod.devices)
  traced, rows = ahead.step_on(model, mesh, 'tpu')
  planned = ahead.compile_program(traced, lambda compiled: [*rows(compiled), ('xla', compiled.memory_analysis())], 4)
  measured, rows = planned.memory[-1][1], dict(planned.memory)
  assert rows['total'] == (measured.argument_size_in_bytes + measured.output_size_in_bytes
                           - measured.alias_size_in_bytes + measured.temp_size_in_bytes)
  assert rows['total'] >= rows['parameters'] + rows['optimizer'] + rows['averages'] > 0
  assert any(c.kind == 'all-reduce' for c in planned.collectives)
  found = plan.plan(config, pod, 'step', price=2)
  low, high = found['run']['hours']
  assert 0 < low <= high and found['step']['fits'] and found['largest_batch'] > 16
  assert found['run']['price'] == [low * 4 * 2, high * 4 * 2]


@needs_libtpu
def test_libtpu_refuses_a_slice_that_is_none():
  with pytest.raises(UserError, match=r'libtpu knows no v5e:3x3: slices of v5e are 2x2'):
    topology.describe('v5e:3x3')
