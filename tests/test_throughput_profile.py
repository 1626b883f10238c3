"""Where time goes (experiments/throughput/hlo.py, profile.py): programs and traces written here, and one real one."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.nets.unet import UNet
from diffusion_jax.runtime.config import UserError
from experiments.throughput import equal, hlo, profile
from experiments.throughput.profile import Event

TEXT = r'''HloModule jit_f, is_scheduled=true

%fused (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %m = f32[4,8]{1,0} multiply(%p, %p), metadata={op_name="jit(f)/jvp(UNet)/block/norm_0/mul" stack_frame_id=1}
}

%inner (q: f32[4,8]) -> f32[4,8] {
  %q = f32[4,8]{1,0} parameter(0)
  ROOT %d = f32[4,8]{1,0} dot(%q, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(f)/transpose(jvp(UNet))/block/conv_0/jvp(UNet)/block/conv_0/checkpoint/dot_general"}
}

ENTRY %main (a: f32[4,8], w: f32[8,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %w = f32[8,8]{1,0} parameter(1)
  %norm_fusion = f32[4,8]{1,0} fusion(%a), kind=kLoop, calls=%fused
  %call = f32[4,8]{1,0} call(%norm_fusion), to_apply=%inner
  %conv = f32[2,4,4,16]{3,2,1,0} convolution(%x, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, metadata={op_name="jit(f)/jvp(UNet)/conv_in/conv_general_dilated"}
  %k = f32[3,3,8,16]{3,2,1,0} parameter(2)
  %x = f32[2,4,4,8]{3,2,1,0} parameter(3)
  %adam = f32[8,8]{1,0} add(%w, %w), metadata={op_name="jit(f)/update/add"}
  ROOT %all = (f32[4,8]{1,0}, /*index=1*/f32[8,8]{1,0}) all-reduce(%call, %adam), replica_groups={{0,1}}, to_apply=%sum
}
'''  # noqa: E501


def test_operations_are_told_by_what_they_hold_and_where_they_belong():
  program = hlo.parse(TEXT)
  assert {name: hlo.kind(program, name) for name in ('norm_fusion', 'd', 'conv', 'adam', 'all')} == {
      'norm_fusion': 'norm', 'd': 'convolution', 'conv': 'convolution', 'adam': 'optimizer', 'all': 'collective'}
  assert hlo.flops(program, 'd') == 2 * 4 * 8 * 8
  assert hlo.flops(program, 'conv') == 2 * (2 * 4 * 4 * 16) * (3 * 3 * 8)
  assert program.children('call') == ['q', 'd'] and program.children('norm_fusion') == []


def test_paths_lose_what_is_of_jax():
  for text, modules, backward in [
      ('jit(f)/jvp(UNet)/down_0_block_1/conv_0/jit(_pad)/pad', ('UNet', 'down_0_block_1', 'conv_0'), False),
      ('jit(f)/transpose(jvp(UNet))/a/jvp(UNet)/a/checkpoint/mul', ('UNet', 'a'), True),
      ('jit(generate)/while/body/closed_call/UNet/mid/attention/dot_general', ('UNet', 'mid', 'attention'), False),
      ('jit(f)/jvp()/mul', (), False), ('x', (), False)]:
    assert hlo.path(text) == modules and hlo.is_backward(text) == backward


def test_time_is_that_from_beginnings_to_ends_and_of_each_operation_alone():
  program = hlo.parse(TEXT)
  found = [Event('call', 'jit_f', 0.0, 10.0), Event('d', 'jit_f', 1.0, 2.0), Event('d', '', 6.9, 0.1),  # runs on
           Event('conv', 'jit_f', 10.0, 5.0), Event('other', 'jit_g', 0.0, 3.0), Event('new', 'jit_f', 20.0, 1.0)]
  assert profile.main_program(found) == 'jit_f'
  times = profile.spent(found, 'jit_f')
  assert times['d'] == (1, pytest.approx(5.9))
  rows = {row.name: row for row in profile.rows(program, times)}
  assert rows['call'].seconds == pytest.approx(10.0 - 5.9) and rows['conv'].seconds == pytest.approx(5.0)
  assert rows['d'].backward and rows['d'].path == ('UNet', 'block', 'conv_0') and rows['new'].kind == 'unknown'
  assert sum(row.seconds for row in rows.values()) == pytest.approx(16.0)
  text = profile.render(list(rows.values()), 2, 1, 0.5, 2)
  assert '500.00 ms an iteration' in text and 'UNet/block/conv_*: convolution' in text
  assert 'The longest 2 of 4 operations' in text


def test_a_program_that_runs_is_found_with_its_modules(tmp_path):
  net = UNet(channels=8, multipliers=(1,), blocks=1, attention=(4,), groups=4)
  x, noise = jnp.ones((2, 4, 4, 1)), jnp.ones(2)
  params = equal.random_params(jax.eval_shape(net.init, jax.random.key(0), x, noise, {})['params'])
  step = jax.jit(lambda params: net.apply({'params': params}, x, noise, {}))
  found, wall = profile.profile(lambda k: [jax.block_until_ready(step(params)) for _ in range(k)], 2, tmp_path)
  assert wall > 0 and sum(row.seconds for row in found) > 0
  kinds, paths = {row.kind for row in found}, {segment for row in found for segment in row.path}
  assert {'convolution', 'norm', 'attention'} <= kinds and {'conv_in', 'conv_out', 'attention'} <= paths
  assert not [row for row in found if row.kind == 'unknown']
  one = next(row for row in found if row.path[-1:] == ('conv_in',) and row.kind == 'convolution')
  assert one.runs % 2 == 0 and one.flops == 2 * np.prod(x.shape) * 3 * 3 * 8


def test_what_is_no_program_is_refused():
  for flags, message in [(['--cases=small_trian'], "'small_trian'; did you mean 'small_train'"),
                         (['--cases=read_32'], 'read_32 is not the time of one program'),
                         (['--cases=small_train', '--top=0'], '--top must be at least 1, got 0')]:
    with pytest.raises(UserError, match=message):
      profile.main(flags)
