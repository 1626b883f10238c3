"""LoRA files: their names, what they mean, and what is no such file."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import theirs
from flax.traverse_util import flatten_dict, unflatten_dict
from nets import filled
from safetensors.numpy import load_file
from test_lora import adapters_of, bits, merge

from diffusion_jax.convert import clip, unet_condition
from diffusion_jax.convert import lora as convert
from diffusion_jax.nets import lora
from diffusion_jax.nets.clip import CLIPText
from diffusion_jax.nets.text_unet import TextUNet
from diffusion_jax.runtime.config import UserError

SD = TextUNet(channels=4, multipliers=(1, 2), blocks=1, groups=2, depth=(1, 0), heads=2, text=5)
CLIP = CLIPText(vocabulary=9, width=8, depth=2, heads=2, mlp=16, length=4, projection=4)


@pytest.fixture(scope='module')
def parts():
  return {'unet': (unet_condition.table(SD), filled(unet_condition.shapes(SD))),
          'text_encoder': (clip.table(CLIP), filled(clip.shapes(CLIP)))}


@pytest.fixture(scope='module')
def adapters(parts):
  """For both networks, of several ranks, and one module with an alpha."""
  of_unet = adapters_of(parts['unet'][1], 2) | {'conv_in': adapters_of(parts['unet'][1], 3, 'conv_in')['conv_in']}
  of_text = adapters_of(parts['text_encoder'][1], 4)
  of_text['block_0']['mlp_in'] = adapters_of(parts['text_encoder'][1], 3, 'block_0/mlp_in')['block_0']['mlp_in']
  of_text['block_1']['query']['alpha'] = jnp.float32(2.5)
  return {'unet': of_unet, 'text_encoder': of_text}


def same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    assert bits(a[name]) == bits(b[name])


def same_tensors(a, b):
  assert bits(dict(a)) == bits(dict(b))


@pytest.mark.parametrize('linear', [False, True])
def test_files_go_there_and_back_bit_for_bit(parts, adapters, linear, tmp_path):
  convert.write(tmp_path / 'a', parts, adapters, linear=linear)
  same(convert.read(tmp_path / 'a', parts), adapters)
  file = tmp_path / 'a' / 'pytorch_lora_weights.safetensors'
  assert [path.name for path in file.parent.iterdir()] == [file.name]
  tensors = load_file(file)
  extra = convert.metadata(parts, adapters)
  same_tensors(convert.to_theirs(parts, convert.from_theirs(parts, tensors, extra), linear=linear), tensors)
  convert.write(tmp_path / 'half.safetensors', parts, {'unet': adapters['unet']}, np.float16)
  half = convert.read(tmp_path / 'half.safetensors', parts)['unet']
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.float16(b)), half, adapters['unet'])


def test_names_are_diffusers(parts, adapters):
  """As tests/theirs.py has them, written down a second time, and as transformers' encoders have them."""
  tensors = convert.to_theirs(parts, adapters)
  for key in tensors:
    part, name = key.split('.', 1)
    name, half = name.rsplit('.lora_', 1)
    assert half in ('A.weight', 'B.weight') and part in parts
    if part == 'unet':
      assert theirs.ours(name, 2) in lora.modules(adapters['unet'])
  assert tensors['text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_A.weight'].shape == (4, 8)
  assert tensors['text_encoder.text_projection.lora_B.weight'].shape == (4, 4)
  attention = 'unet.down_blocks.0.attentions.0.'
  assert tensors[f'{attention}transformer_blocks.0.attn2.to_k.lora_A.weight'].shape == (2, 5)
  assert tensors[f'{attention}proj_in.lora_A.weight'].shape == (2, 4, 1, 1)
  assert tensors['unet.conv_in.lora_A.weight'].shape == (3, 4, 3, 3)
  assert tensors['unet.conv_in.lora_B.weight'].shape == (4, 3, 1, 1)
  assert convert.metadata(parts, {'unet': adapters['unet']}) == {}
  options = json.loads(convert.metadata(parts, adapters)['lora_adapter_metadata'])
  assert {key: value for key, value in options.items() if not key.endswith('target_modules')} == {
      'text_encoder.r': 4, 'text_encoder.lora_alpha': 4, 'text_encoder.rank_pattern': {'encoder.layers.0.mlp.fc1': 3},
      'text_encoder.alpha_pattern': {'encoder.layers.0.mlp.fc1': 3, 'encoder.layers.1.self_attn.q_proj': 2.5}}


def test_merging_is_adding_their_products(parts, adapters):
  """W + B A in PyTorch's order of axes, for matrices and for convolutions."""
  base = unet_condition.to_theirs(SD, parts['unet'][1])
  merged = unet_condition.to_theirs(SD, merge(parts['unet'][1], adapters['unet'], 0.5))
  tensors = convert.to_theirs(parts, {'unet': adapters['unet']})
  seen = 0
  for key, weight in base.items():
    name = f'unet.{key.removesuffix(".weight")}.lora_'
    if f'{name}A.weight' in tensors and key.endswith('.weight'):
      down, up = (tensors[f'{name}{half}.weight'].astype(np.float64) for half in 'AB')
      weight = weight + 0.5 * np.einsum('or,ri...->oi...', up.reshape(up.shape[:2]), down)
      seen += 1
    np.testing.assert_allclose(merged[key], weight, atol=1e-5)
  assert 2 * seen == len(tensors)


@pytest.mark.parametrize('form', ['diffusers', 'processors', 'kohya', 'unet alone'])
def test_older_forms_are_read(parts, adapters, form):
  of_unet = adapters_of(parts['unet'][1], 2, '/(self|cross)/(query|key|value|out)/')
  tensors, old = convert.to_theirs(parts, {'unet': of_unet}), {}
  for key, tensor in tensors.items():
    half = 'down' if 'lora_A' in key else 'up'
    module = key.rsplit('.lora_', 1)[0]
    if form == 'diffusers':
      old[f'{module}.lora.{half}.weight'] = tensor
    elif form == 'processors':
      block, name = module.replace('to_out.0', 'to_out').rsplit('.', 1)
      old[f'{block}.processor.{name}_lora.{half}.weight'] = tensor
    elif form == 'kohya':
      old[f'lora_{module.replace(".", "_")}.lora_{half}.weight'] = tensor
      old[f'lora_{module.replace(".", "_")}.alpha'] = np.float32(1)
    else:
      old[key.removeprefix('unet.')] = tensor
  read = convert.from_theirs(parts, old)
  if form == 'kohya':
    assert all(module.pop('alpha') == 1 for module in lora.modules(read['unet']).values())
    read = {'unet': unflatten_dict({path: leaf for path, leaf in flatten_dict(read['unet']).items()
                                    if path[-1] != 'alpha'})}
  same(read, {'unet': of_unet})


def test_older_forms_of_text_encoders_are_read(parts, adapters):
  of_text = adapters_of(parts['text_encoder'][1], 2, 'block_0/(query|mlp_in)')
  tensors = convert.to_theirs(parts, {'text_encoder': of_text})
  for form in ('lora_te_{flat}.lora_{half}.weight', 'lora_te1_{flat}.lora_{half}.weight',
               'text_encoder.{name}.lora_linear_layer.{half}.weight', 'text_encoder.{short}.lora_{A}.weight'):
    old = {}
    for key, tensor in tensors.items():
      name, _, A = key.removeprefix('text_encoder.').removesuffix('.weight').rpartition('.lora_')
      old[form.format(name=name, flat=name.replace('.', '_'), short=name.removeprefix('text_model.'), A=A,
                      half={'A': 'down', 'B': 'up'}[A])] = tensor
    same(convert.from_theirs(parts, old), {'text_encoder': of_text})


def test_pefts_options_say_alpha(parts):
  of_unet = adapters_of(parts['unet'][1], 2, '/(self|cross)/(query|key)/')
  tensors = convert.to_theirs(parts, {'unet': of_unet})
  options = {'lora_alpha': 8, 'alpha_pattern': {'attn1.to_k': 2, '^attn1.to_q': 5,
                                                '^mid_block.attentions.0.transformer_blocks.0.attn2.to_q': 16}}
  for start in ('unet.', ''):
    said = {'lora_adapter_metadata': json.dumps({f'{start}{key}': value for key, value in options.items()})}
    read = lora.modules(convert.from_theirs(parts, tensors, said)['unet'])
    for path, module in read.items():
      alpha = 2 if path[-2:] == ('self', 'key') else 8
      alpha = 16 if path == ('middle_attention', 'block_0', 'cross', 'query') else alpha
      assert module.get('alpha', 2) == alpha and ('alpha' in module) == (alpha != 2)


def test_what_cannot_be_read_is_named(parts, adapters, tmp_path):
  tensors = convert.to_theirs(parts, {'unet': adapters['unet']})
  key = 'unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight'
  odd = lambda name: {name if k == key else k: tensor for k, tensor in tensors.items()}
  metadata = lambda **options: {'lora_adapter_metadata': json.dumps(options)}
  for file, extra, words in [
      (odd(key.replace('to_q', 'to_p')), {}, r'^F holds .*attn1\.to_p\.lora_A\.weight \(nearest: unet\.down_'),
      (odd(key.replace('lora_A', 'dora_scale')), {}, r'holds .*dora_scale.weight \(nearest: '),
      ({f'text_encoder_2.{k}': tensor for k, tensor in tensors.items()}, {},
       r'and \d+ more: it is no LoRA file, or one for other networks than unet and text_encoder'),
      ({'unet.conv_norm_out.lora_A.weight': np.ones((1, 4), np.float32)}, {}, 'holds unet.conv_norm_out.lora_A.weight'),
      ({}, {}, 'holds nothing'),
      ({k: a for k, a in tensors.items() if k != key}, {}, r'lacks the other half of .*to_q\.lora_B\.weight: '),
      ({**tensors, key: np.ones((2, 5), np.float32)}, {}, rf'{key} has \[2, 5\] and not \[2, 4\]$'),
      ({**tensors, 'unet.conv_in.lora_B.weight': np.ones((4, 2, 1, 1), np.float32)}, {},
       r'conv_in.lora_B.weight has \[4, 2, 1, 1\] and not \[4, 3, 1, 1\]'),
      ({'unet.conv_in.lora_A.weight': np.ones((0, 4, 3, 3), np.float32),
        'unet.conv_in.lora_B.weight': np.ones((4, 0, 1, 1), np.float32)}, {}, r'lora_A.weight has \[0, 4, 3, 3\]'),
      ({**tensors, 'unet.conv_in.alpha': np.ones(3)}, {}, r'conv_in.alpha has \[3\] and not \[\]'),
      ({**tensors, key: tensors[key].astype(np.float64)}, {}, r'float32 cannot hold .*to_q.lora_A.weight \(float64\)'),
      (tensors, metadata(**{'unet.use_rslora': True}), r'adapters of unet by alpha / sqrt\(r\) \(use_rslora\)'),
      (tensors, metadata(alpha_pattern={'(.*)+': 3}), r"alpha_pattern must hold names of modules, got '\(\.\*\)\+'"),
      (tensors, metadata(lora_alpha='much'), 'its lora_adapter_metadata cannot be read: could not convert'),
      (tensors, {'lora_adapter_metadata': '[]'}, 'its lora_adapter_metadata cannot be read'),
  ]:
    with pytest.raises(UserError, match=words):
      convert.from_theirs(parts, file, extra, 'F')
  (tmp_path / 'cut.safetensors').write_bytes(b'\x10\0\0\0\0\0\0\0{')
  for name, words in [('a.bin', 'is a pickle'), ('cut.safetensors', 'is damaged'),
                      ('none.safetensors', 'cannot be read'), ('.', 'pytorch_lora_weights.safetensors cannot be read')]:
    with pytest.raises(UserError, match=words):
      convert.read(tmp_path / name, parts)
  with pytest.raises(UserError, match="called unet in a LoRA file has no 'embed_at'"):
    convert.to_theirs(parts, {'unet': {'embed_at': adapters['unet']['conv_in']}})
  with pytest.raises(UserError, match='adapters of text_encoder_2, and the networks are unet and text_encoder'):
    convert.to_theirs(parts, {'text_encoder_2': adapters['unet']})
