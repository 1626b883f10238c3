"""ControlNet: diffusers' ControlNetModel, its names, and laws of a copy that begins without an effect."""
import functools
import json
import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import filled, jit, normal
from safetensors.numpy import load_file
from test_parity import first, loaded

from diffusion_jax.convert import controlnet as convert
from diffusion_jax.convert import files, unet_condition
from diffusion_jax.nets import blocks, edm2
from diffusion_jax.nets.controlnet import ControlNet, WithControl, copied
from diffusion_jax.nets.text_unet import TextUNet
from diffusion_jax.nets.unet import ADM, DDPMpp, NCSNpp, UNet
from diffusion_jax.runtime.config import UserError

FIXTURE = pathlib.Path(__file__).parent / 'fixtures' / 'controlnet_sd15'
SD = functools.partial(TextUNet, channels=4, multipliers=(1, 2), blocks=1, groups=2, depth=(1, 0), heads=2, text=6)
XL = SD(depth=(0, 2), heads=(1, 2), vector=9)
flat = functools.partial(flax.traverse_util.flatten_dict, sep='/')


def inputs(net, space=(8, 4), channels=2, hint=3, factor=2, batch=2):
  """(x, noise, cond) for a network, and a hint `factor` times its size."""
  cond = {'hint': normal(batch, *(factor * n for n in space), hint, seed=2), 'label': np.arange(batch) % 2}
  if isinstance(net, TextUNet):
    cond |= {'text': normal(batch, 3, net.text, seed=3), 'vector': normal(batch, net.vector, seed=4),
             'image': normal(batch, *space, net.image, seed=5)}
  return normal(batch, *space, channels), np.linspace(9, 900, batch, dtype=np.float32), cond


def shapes_of(net, *arguments):
  return jax.eval_shape(net.init, jax.random.key(0), *arguments)['params']


# Laws


@pytest.fixture(scope='module')
def model():
  """(net, inputs, parameters at the beginning of training): the U-Net's are not at theirs, but as if it was trained."""
  net = WithControl(UNet(channels=4, multipliers=(1,), blocks=1, groups=2, num_classes=2), widths=(4, 6))
  arguments = inputs(net.net, (4,))
  shapes = shapes_of(net, *arguments)
  base = filled(shapes['net'])
  control = jit(lambda *a: {name: leaf for name, leaf in ControlNet(net.net, widths=net.widths).init(
      jax.random.key(0), *a)['params'].items() if name != 'encoder'})(*arguments)
  params = {'net': base, 'control': copied({**control, 'encoder': shapes['control']['encoder']}, base)}
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
  return net, arguments, params


@pytest.fixture(scope='module')
def run(model):
  """run(params, hint_scale): the outputs of the whole and of its U-Net alone, and the ControlNet's residuals."""
  net, (x, noise, cond), _ = model
  whole, alone = jit(net.apply), jit(net.net.apply)
  residuals = jit(ControlNet(net.net, widths=net.widths).apply)
  def run(params, scale):
    steered = x, noise, cond | {'hint_scale': np.float32(scale)}
    return (whole({'params': params}, *steered), alone({'params': params['net']}, x, noise, cond),
            residuals({'params': params['control']}, *steered))
  return run


def test_at_initialisation_the_output_is_the_nets_bit_for_bit(model, run):
  """Whatever the weights of all that comes before the pointwise convolutions."""
  out, alone, residuals = run(model[-1], [1, 1])
  np.testing.assert_array_equal(out, alone)
  assert np.abs(out).max() > 0.1 and not any(map(np.any, residuals))
  control = {**filled(model[-1]['control']), **{name: leaf for name, leaf in model[-1]['control'].items()
                                                if name.startswith(('skip_', 'middle'))}}
  np.testing.assert_array_equal(run({**model[-1], 'control': control}, [1, 1])[0], alone)


def test_the_scale_is_of_each_example(model, run):
  params = filled(model[-1])
  out, alone, residuals = run(params, [0, 2])
  np.testing.assert_array_equal(out[0], alone[0])
  assert np.abs(out[1] - alone[1]).max() > 0.1
  for scaled, one in zip(residuals, run(params, [1, 1])[2], strict=True):
    np.testing.assert_array_equal(scaled, one * np.float32([0, 2])[:, None, None])


@pytest.mark.parametrize(('net', 'space'), [
    (UNet(channels=4, multipliers=(1, 2), blocks=2, groups=2, attention=(4,)), (8,)),
    (DDPMpp(channels=4, multipliers=(1, 2), blocks=1, groups=2, augment=9), (8, 4)),
    (NCSNpp(channels=4, multipliers=(1, 2, 1), blocks=1, groups=2, num_classes=2), (8, 4)),
    (ADM(channels=4, multipliers=(1, 2), blocks=1, groups=2, attention=(4,), head_channels=2, variance=True), (4, 8)),
    (XL, (8,)), (SD(image=2, dtype='bfloat16', remat='blocks'), (4, 2, 4))])
def test_residuals_are_what_the_net_takes_and_the_encoder_is_its_own(net, space):
  """In every family and on one to three axes; nothing is computed."""
  whole = WithControl(net, widths=(4, 6))
  arguments = inputs(net, space)
  out, variables = jax.eval_shape(lambda *a: whole.init_with_output(jax.random.key(0), *a), *arguments)
  assert (out.shape, out.dtype) == ((2, *space, 2 * (1 + net.variance)), jnp.float32)
  base, encoder = flat(variables['params']['net']), flat(variables['params']['control']['encoder'])
  assert {name: base[name] for name in encoder} == encoder
  assert {name.split('_')[0] for name in set(base) - set(encoder)} == {'up', 'norm', 'conv'}
  assert {name.split('/')[0] for name in set(base) - set(encoder) if not name.startswith('up')} == {
      'norm_out', 'conv_out'}
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}


def test_what_is_trained_at_the_first_steps(model):
  """The pointwise convolutions; then the encoder and the last of the hint's; then the others of the hint's too."""
  net, arguments, params = model
  target = normal(*arguments[0].shape, seed=9)
  loss = lambda control: jnp.mean((net.apply({'params': {**params, 'control': control}}, *arguments) - target) ** 2)
  def step(control):
    grads = jax.grad(loss)(control)
    return (jax.tree.map(lambda p, g: p - 0.1 * g, control, grads),
            jax.tree.map(lambda g: jnp.any(g != 0), grads))
  control, trained, step = params['control'], [], jit(step)
  for _ in range(3):
    control, moved = step(control)
    trained.append({name for name, one in flat(moved).items() if one and not unseen(name)})
  everything = {name for name in flat(control) if not unseen(name)}
  first_of_hint = {name for name in everything if name.startswith('hint_in/') and not name.startswith('hint_in/out')}
  assert trained[0] == {name for name in everything if name.startswith(('skip_', 'middle/'))}
  assert trained[1] == everything - first_of_hint
  assert trained[2] == everything


def unseen(name):
  """Attention does not depend on a key's bias: its gradient is zero, or what rounding leaves of it."""
  return name.endswith('/key/bias')


def test_copied_copies_bits_and_nothing_else(model):
  params = model[-1]
  control = filled(params['control'], seed=7)
  made = copied(control, params['net'])
  jax.tree.map(np.testing.assert_array_equal, {**made, 'encoder': 0}, {**control, 'encoder': 0})
  base, encoder = flat(params['net']), flat(made['encoder'])
  assert set(encoder) == set(flat(control['encoder']))
  for name, leaf in encoder.items():
    np.testing.assert_array_equal(leaf, base[name])
    assert leaf is not base[name]  # or a step that gives its arguments away would give one twice


@pytest.mark.parametrize(('make', 'words'), [
    (lambda: ControlNet(edm2.UNet()), 'of UNet, DDPMpp, NCSNpp, ADM or TextUNet, not of UNet: set net'),
    (lambda: ControlNet(SD(), widths=()), r'widths at least one number .*, got 3 and \(\)'),
    (lambda: ControlNet(SD(), hint=0), 'hint must be at least 1 .*, got 0 and'),
    (lambda: shapes_of(WithControl(SD()), *inputs(SD())),
     r"cond\['hint'\] must be \[2, 64, 32, 3\] for an input of \[2, 8, 4, 2\] and 4 widths, got \[2, 16, 8, 3\]"),
    (lambda: shapes_of(WithControl(SD()), *inputs(SD())[:2], {}), r"cond\['hint'\] must be .*, got none"),
    (lambda: copied({'encoder': {'conv_in': {'bias': np.zeros(4)}}}, {'conv_in': {'bias': np.zeros(5)}}),
     r'conv_in/bias is \[4\] in the ControlNet and \[5\] in the U-Net'),
    (lambda: copied({'encoder': {'conv_in': {'bias': np.zeros(4)}}}, {}), r'conv_in/bias .* missing in the U-Net'),
])
def test_bad_arguments_are_named(make, words):
  with pytest.raises(ValueError, match=words):
    make()


# diffusers


@pytest.fixture(scope='module')
def theirs():
  """(net, their tensors, inputs and residuals)."""
  config = json.loads(FIXTURE.with_suffix('.json').read_text())['config']
  return convert.net(config), load_file(FIXTURE.with_suffix('.safetensors')), np.load(FIXTURE.with_suffix('.npz'))


def test_equals_diffusers(theirs):
  """ControlNetModel of the structure of Stable Diffusion 1's with random weights, computed there in float64."""
  net, tensors, saved = theirs
  last = lambda name: np.moveaxis(saved[name], 1, -1)
  cond = {'text': saved['in/ctx'], 'hint': last('in/cond'), 'hint_scale': 0.7}
  params = convert.from_theirs(net, tensors)
  residuals = jit(lambda params, *a: net.apply({'params': params}, *a))(params, last('in/sample'), saved['in/t'], cond)
  names = [*(f'out64/down{i}' for i in range(12)), 'out64/mid']
  for residual, name in zip(residuals, names, strict=True):
    np.testing.assert_allclose(residual, last(name), atol=1e-4, err_msg=name)


def test_names_and_configs_go_there_and_back_bit_for_bit(theirs):
  net, tensors, _ = theirs
  back = convert.to_theirs(net, convert.from_theirs(net, tensors))
  assert set(back) == set(tensors)
  for key, tensor in tensors.items():
    assert back[key].dtype == tensor.dtype
    np.testing.assert_array_equal(back[key].view(np.uint32), tensor.view(np.uint32))


@pytest.mark.parametrize('net', [
    ControlNet(SD()), ControlNet(XL, hint=1, widths=(4,)), ControlNet(TextUNet()),
    ControlNet(TextUNet(image=5, text=1024, heads=(5, 10, 20, 20)), widths=(8, 8)),
    ControlNet(TextUNet(multipliers=(1, 2, 4), depth=(0, 2, 10), heads=(5, 10, 20), vector=2816))])
def test_configs_go_there_and_back(net):
  assert convert.net(json.loads(json.dumps(convert.config(net)))) == net


@pytest.mark.parametrize(('changes', 'words'), [
    ({'controlnet_conditioning_channel_order': 'bgr'}, "channel_order is 'bgr', and only 'rgb' can be converted"),
    ({'global_pool_conditions': True}, 'global_pool_conditions is True, and only False'),
    ({'mid_block_type': 'UNetMidBlock2D'}, "mid_block_type is 'UNetMidBlock2D', and only 'UNetMidBlock2DCrossAttn'"),
    ({'class_embed_type': 'projection'}, "ControlNetModel: class_embed_type is 'projection', and only None"),
    ({'in_channels': 3}, 'in_channels must be at least the 4 of the latents, got 3'),
    ({'conditioning_embedding_out_channels': None}, 'must be a list of numbers, got None'),
    ({'down_block_types': ['K', 'DownBlock2D']}, "down_block_types is .*'K'"),
])
def test_what_cannot_be_converted_is_named(changes, words):
  with pytest.raises(UserError, match=words):
    convert.net({**convert.config(ControlNet(SD())), **changes})


def test_files_of_another_network_are_named():
  net = ControlNet(SD(multipliers=(1,), depth=(1,)), widths=(4, 6))
  tensors = convert.to_theirs(net, filled(convert.shapes(net)))
  for changes, words in [
      ({'controlnet_mid_block.bias': None}, r'file of ControlNetModel lacks controlnet_mid_block\.bias'),
      ({'controlnet_down_blocks.2.bias': np.zeros(8)}, r'no place for: controlnet_down_blocks\.2\.bias'),
      ({'controlnet_cond_embedding.blocks.1.bias': np.zeros(3)}, r'blocks\.1\.bias has \[3\] and not \[6\]')]:
    changed = {key: tensor for key, tensor in {**tensors, **changes}.items() if tensor is not None}
    with pytest.raises(UserError, match=words):
      convert.from_theirs(net, changed)


@pytest.mark.parametrize(('net', 'linear'), [
    (ControlNet(SD(image=1), widths=(4, 6)), False),
    (ControlNet(XL.clone(vector=4 + 6 * unet_condition.SIZE_CHANNELS), hint=1, widths=(4,)), True)])
def test_diffusers_loads_what_is_written(net, linear, tmp_path):
  """Nothing missing, nothing left over, the same residuals; skipped without the extra `parity`."""
  params = filled(convert.shapes(net))
  tensors = convert.to_theirs(net, params, linear=linear)
  files.write(tmp_path, convert.config(net, linear=linear), tensors, 'diffusion_pytorch_model')
  model, torch = loaded('diffusers', 'ControlNetModel', tmp_path)
  x, noise, cond = inputs(net.net, (8, 8), 4, net.hint, 2 ** (len(net.widths) - 1))
  ids, pooled = np.float32([[8, 8, 0, 1, 8, 8], [9, 7, 2, 0, 9, 7]]), cond['vector'][:, :4]
  sizes = jax.vmap(lambda ids: blocks.cosines_and_sines(ids, unet_condition.SIZE_CHANNELS).ravel())(ids)
  added = {'vector': jnp.concatenate([pooled, sizes], 1)} if net.net.vector else {}
  ours = jit(net.apply)({'params': params}, x, noise, cond | added)
  down, middle = model(
      first(np.concatenate([x, cond['image']], -1), torch), torch.tensor(noise), torch.tensor(cond['text']),
      first(cond['hint'], torch), return_dict=False,
      added_cond_kwargs={'text_embeds': torch.tensor(pooled), 'time_ids': torch.tensor(ids)})
  for residual, their in zip(ours, [*down, middle], strict=True):
    np.testing.assert_allclose(first(residual, torch), their, atol=1e-4)
