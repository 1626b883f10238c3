"""U-Nets of DDPM and ADM and diffusers' UNet2DModel, of Stable Diffusion and UNet2DConditionModel: names, configs."""
import json
import pathlib

import jax
import numpy as np
import pytest
import theirs
from nets import jit
from safetensors.numpy import load_file

from diffusion_jax.convert import unet2d as convert
from diffusion_jax.convert import unet_condition
from diffusion_jax.nets.text_unet import TextUNet
from diffusion_jax.nets.unet import ADM, DDPMpp, UNet
from diffusion_jax.runtime.config import UserError

FIXTURE = pathlib.Path(__file__).parent / 'fixtures' / 'unet2d_ddpm_cifar10'
NET = UNet(channels=8, multipliers=(1, 2, 2, 2), groups=4, dropout=0.0)


@pytest.fixture(scope='module')
def tensors():
  return load_file(FIXTURE.with_suffix('.safetensors'))


def same(a, b):
  """Two dicts of arrays hold the same names and bits."""
  bits = lambda tensors: {key: (array.dtype, array.shape, array.tobytes()) for key, array in tensors.items()}
  assert bits(a) == bits(b)


def test_equals_diffusers(tensors):
  saved = np.load(FIXTURE.with_suffix('.npz'))
  net = convert.net(convert.config(NET, 32))
  assert net == NET
  params = convert.from_theirs(net, tensors, 32)
  x = saved['sample'].transpose(0, 2, 3, 1)
  out = jit(lambda params, x, t: net.apply({'params': params}, x, t, {}))(params, x, saved['timestep'])
  np.testing.assert_allclose(out, saved['output'].transpose(0, 2, 3, 1), atol=1e-4)


def test_names_go_there_and_back_bit_for_bit(tensors):
  same(convert.to_theirs(NET, convert.from_theirs(NET, tensors, 32)), tensors)


def test_adms_names_go_there_and_back_bit_for_bit():
  """tests/test_unet_families.py has the output of these weights; its names are written down a second time, apart."""
  weights = theirs.remade(np.load(FIXTURE.with_name('unet_families.npz'))['adm/keys'], 'adm')
  net = ADM(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), groups=4, num_classes=3, variance=True,
            head_channels=4)
  params = convert.from_theirs(net, weights, 8, len(weights['conv_in.weight'][0]))
  jax.tree.map(np.testing.assert_array_equal, params, theirs.converted(weights, 2))
  same(convert.to_theirs(net, params), weights)


@pytest.mark.parametrize('net', [NET, UNet(num_classes=10), UNet(attention=(16, 8), blocks=3, variance=True),
                                 ADM(num_classes=1000), ADM(attention=(8,), head_channels=0)])
def test_configs_go_there_and_back(net):
  assert convert.net(json.loads(json.dumps(convert.config(net, 32)))) == net


@pytest.mark.parametrize(('key', 'value', 'words'), [
    ('attention_head_dim', 8, 'attention_head_dim is 8, and only None can be converted'),
    ('norm_eps', 1e-5, 'norm_eps is 1e-05, and only 1e-06'),
    ('resnet_time_scale_shift', 'ada', "resnet_time_scale_shift is 'ada', and only 'default'"),
    ('up_block_types', ['UpBlock2D'] * 4, "up_block_types is .*, and only .*AttnUpBlock2D"),
    ('down_block_types', ['SkipDownBlock2D'] * 4, "down_block_types is .*SkipDownBlock2D"),
    ('out_channels', 4, 'out_channels is 4, and only 3 or 6'),
    ('block_out_channels', [8, 12, 16, 16], r'must be multiples of the first, got \[8, 12, 16, 16\]'),
])
def test_what_cannot_be_converted_is_named(key, value, words):
  with pytest.raises(UserError, match=words):
    convert.net({**convert.config(NET, 32), key: value})


def test_adm_without_a_norm_in_the_middle_is_another_network():
  config = {**convert.config(ADM(), 64), 'attn_norm_num_groups': None}
  with pytest.raises(UserError, match='attn_norm_num_groups is None, and only 32 can be converted'):
    convert.net(config)


@pytest.mark.parametrize('net', [DDPMpp(), UNet(image=3), ADM(augment=9)])
def test_what_unet2d_is_not_is_refused(net):
  with pytest.raises(UserError, match=rf'UNet or ADM without image or augment, got {type(net).__name__}, image'):
    convert.config(net, 32)


def test_a_config_must_say_where_it_is_ddpms():
  config = convert.config(NET, 32)
  del config['flip_sin_to_cos']
  with pytest.raises(UserError, match="has no 'flip_sin_to_cos'"):
    convert.net(config)


# Stable Diffusion's


SD = TextUNet(channels=4, multipliers=(1, 2, 2), blocks=1, groups=2, depth=(1, 1, 0), heads=(2, 4, 2), text=5)
XL = TextUNet(channels=4, multipliers=(1, 2), blocks=1, groups=2, depth=(0, 2), heads=(1, 2), text=5, vector=27)


@pytest.mark.parametrize(('net', 'name'), [(SD, 'text'), (XL, 'xl')])
def test_stable_diffusions_names_go_there_and_back_bit_for_bit(net, name):
  """tests/test_text_unet.py has the outputs of these weights; its names are written down a second time, apart."""
  weights = theirs.remade(np.load(FIXTURE.with_name('unet_families.npz'))[f'{name}/keys'], name)
  linear = next(tensor.ndim == 2 for key, tensor in weights.items() if key.endswith('proj_in.weight'))
  params = unet_condition.from_theirs(net, weights, channels=2)
  jax.tree.map(np.testing.assert_array_equal, params, theirs.converted(weights, len(net.multipliers)))
  same(unet_condition.to_theirs(net, params, linear=linear), weights)


@pytest.mark.parametrize('net', [SD, XL, TextUNet(), TextUNet(image=5, text=1024, heads=(5, 10, 20, 20)),
                                 TextUNet(multipliers=(1, 2, 4), depth=(0, 2, 10), heads=(5, 10, 20), vector=2816)])
def test_stable_diffusions_configs_go_there_and_back(net):
  assert unet_condition.net(json.loads(json.dumps(unet_condition.config(net, 64)))) == net


@pytest.mark.parametrize(('changes', 'words'), [
    ({'class_embed_type': 'projection'}, "class_embed_type is 'projection', and only None can be converted"),
    ({'addition_embed_type': 'image'}, "addition_embed_type is 'image', and only None or 'text_time'"),
    ({'mid_block_type': None}, "mid_block_type is None, and only 'UNetMidBlock2DCrossAttn'"),
    ({'in_channels': 3}, 'in_channels must be at least out_channels, got 3 and 4'),
    ({'block_out_channels': [4, 6, 8]}, r'must be multiples of the first, got \[4, 6, 8\]'),
    ({'transformer_layers_per_block': [1, 1, 2]}, 'a last level without text must have one transformer layer, got 2'),
    ({'down_block_types': ['CrossAttnDownBlock2D', 'K', 'K']}, r"down_block_types is .*'K'"),
    ({'addition_embed_type': 'text_time'}, "has no 'projection_class_embeddings_input_dim'"),
])
def test_what_stable_diffusion_has_not_is_named(changes, words):
  with pytest.raises(UserError, match=words):
    unet_condition.net({**unet_condition.config(SD, 8), **changes})
