"""LoRA files with diffusers and peft themselves: what we write they apply, what they save we read.

Needs the extra `parity`; without it these tests are skipped.
"""
import jax.numpy as jnp
import numpy as np
import pytest
from nets import filled, jit, normal
from safetensors.numpy import load_file, save_file
from test_lora import EVERY, adapters_of, bits
from test_parity import WHY, first, loaded

from diffusion_jax.convert import clip, files, unet_condition
from diffusion_jax.convert import lora as convert
from diffusion_jax.nets import lora
from diffusion_jax.nets.clip import CLIPText
from diffusion_jax.nets.text_unet import TextUNet

NET = TextUNet(channels=4, multipliers=(1, 2), blocks=1, groups=2, depth=(1, 0), heads=2, text=6)
CLIP = CLIPText(vocabulary=60, width=8, depth=2, heads=2, mlp=12, length=9)


@pytest.fixture(scope='module')
def parts():
  pytest.importorskip('peft', reason=WHY.format('peft'))
  return {'unet': (unet_condition.table(NET), filled(unet_condition.shapes(NET))),
          'text_encoder': (clip.table(CLIP), filled(clip.shapes(CLIP)))}


@pytest.fixture(params=[False, True], ids=['convolutions', 'matrices'])
def model(request, parts, tmp_path):
  """(diffusers' U-Net with our weights, what loads LoRA files into it, torch, whether transformers have matrices)."""
  diffusers, linear = pytest.importorskip('diffusers', reason=WHY.format('diffusers')), request.param
  tensors = unet_condition.to_theirs(NET, parts['unet'][1], linear=linear)
  files.write(tmp_path / 'unet', unet_condition.config(NET, 8, linear=linear), tensors, 'diffusion_pytorch_model')
  model, torch = loaded('diffusers', 'UNet2DConditionModel', tmp_path / 'unet')
  return model, diffusers.StableDiffusionPipeline, torch, linear


INPUTS = normal(2, 4, 4, 4), np.array([7.0, 900.0]), normal(2, 3, 6)
run = jit(lambda params: NET.apply({'params': params}, *INPUTS[:2], {'text': INPUTS[2]}))
merge = jit(lora.merge)


def output(model, torch):
  x, noise, text = INPUTS
  return np.moveaxis(model(first(x, torch), torch.tensor(noise), torch.tensor(text)).sample.detach().numpy(), 1, -1)


def applied(pipeline, model, path):
  """As load_lora_weights of the pipeline does it to its U-Net."""
  tensors, alphas, metadata = pipeline.lora_state_dict(path, return_lora_metadata=True, local_files_only=True)
  pipeline.load_lora_into_unet(tensors, alphas, model, metadata=metadata)


def test_diffusers_applies_what_we_write(parts, model, tmp_path):
  """Every layer adapted, convolutions too, with several ranks, and an alpha that only the metadata tells."""
  model, pipeline, torch, linear = model
  params = parts['unet'][1]
  adapters = adapters_of(params, 2, EVERY) | {'conv_in': adapters_of(params, 3, 'conv_in')['conv_in']}
  base = output(model, torch)
  for alpha in (None, 5.0):
    if alpha:
      adapters['down_0_attention_0']['block_0']['cross']['query']['alpha'] = jnp.float32(alpha)
      adapters['conv_out']['alpha'] = jnp.float32(1)
    folder = tmp_path / str(alpha)
    convert.write(folder, parts, {'unet': adapters}, linear=linear)
    applied(pipeline, model, folder)
    wanted = run(merge(params, adapters))
    np.testing.assert_allclose(output(model, torch), wanted, atol=1e-4)
    assert np.abs(base - wanted).max() > 0.1
    model.delete_adapters('default_0')
  np.testing.assert_array_equal(output(model, torch), base)


def test_we_read_what_peft_saves(parts, model, tmp_path):
  """With an alpha that is not the rank, for some layers another; and from a file that does not say it."""
  model, pipeline, torch, linear = model
  peft = pytest.importorskip('peft')
  targets = ['to_q', 'to_k', 'to_v', 'to_out.0', 'conv1', 'proj_in', 'conv_shortcut', 'ff.net.2', 'time_emb_proj']
  model.add_adapter(peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets, rank_pattern={'conv1': 3},
                                    alpha_pattern={'attn2.to_q': 1}))
  generator = torch.Generator().manual_seed(0)
  for name, weight in model.named_parameters():
    if 'lora_' in name:
      weight.data = torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
  pipeline.save_lora_weights(
      tmp_path, unet_lora_layers=peft.get_peft_model_state_dict(model),
      unet_lora_adapter_metadata=model.peft_config['default'].to_dict())
  model.save_lora_adapter(tmp_path / 'alone', adapter_name='default')
  adapters = convert.read(tmp_path, parts)
  alphas = {float(module.get('alpha', module['down'].shape[-1])) for module in lora.modules(adapters['unet']).values()}
  assert adapters.keys() == {'unet'} and alphas == {1, 6}
  np.testing.assert_allclose(run(merge(parts['unet'][1], adapters['unet'])), output(model, torch), atol=1e-4)
  assert bits(convert.read(tmp_path / 'alone', parts)['unet']) == bits(adapters['unet'])
  theirs = load_file(tmp_path / convert.NAME)
  assert bits(convert.to_theirs(parts, adapters, linear=linear)) == bits(theirs)
  # Where a file says nothing of alpha, diffusers takes it for the rank.
  save_file(theirs, tmp_path / 'plain.safetensors', {'format': 'pt'})
  model.delete_adapters('default')
  applied(pipeline, model, tmp_path / 'plain.safetensors')
  plain = convert.read(tmp_path / 'plain.safetensors', parts)['unet']
  np.testing.assert_allclose(run(merge(parts['unet'][1], plain)), output(model, torch), atol=1e-4)


def test_both_read_kohyas_files_alike(parts, model, tmp_path):
  model, pipeline, torch, linear = model
  old, adapters = {}, adapters_of(parts['unet'][1], 2, 'attention')
  for key, tensor in convert.to_theirs(parts, {'unet': adapters}, linear=linear).items():
    module, _, half = key.removesuffix('.weight').rpartition('.lora_')
    flat = f'lora_{module.replace(".", "_")}'
    old |= {f'{flat}.lora_{"down" if half == "A" else "up"}.weight': tensor, f'{flat}.alpha': np.array(1, np.float32)}
  save_file(old, tmp_path / 'kohya.safetensors')
  applied(pipeline, model, tmp_path / 'kohya.safetensors')
  adapters = convert.read(tmp_path / 'kohya.safetensors', parts)['unet']
  np.testing.assert_allclose(run(merge(parts['unet'][1], adapters)), output(model, torch), atol=1e-4)


def test_text_encoders_too(parts, tmp_path):
  pipeline = pytest.importorskip('diffusers', reason=WHY.format('diffusers')).StableDiffusionPipeline
  params = parts['text_encoder'][1]
  files.write(tmp_path / 'clip', clip.config(CLIP), clip.to_theirs(CLIP, params), 'model')
  model, torch = loaded('transformers', 'CLIPTextModel', tmp_path / 'clip')
  adapters = adapters_of(params, 2)
  adapters['block_1']['query']['alpha'] = jnp.float32(7)
  convert.write(tmp_path, parts, {'text_encoder': adapters})
  tensors, alphas, metadata = pipeline.lora_state_dict(tmp_path, return_lora_metadata=True, local_files_only=True)
  ids = np.random.default_rng(0).integers(1, 57, (2, 9))
  text = jit(lambda params: CLIP.apply({'params': params}, jnp.asarray(ids)).text)
  np.testing.assert_allclose(text(params), model(torch.tensor(ids)).last_hidden_state, atol=1e-4)
  pipeline.load_lora_into_text_encoder(tensors, alphas, model, prefix='text_encoder', metadata=metadata)
  wanted = text(merge(params, adapters))
  np.testing.assert_allclose(wanted, model(torch.tensor(ids)).last_hidden_state.detach(), atol=1e-4)
  assert np.abs(wanted - text(params)).max() > 0.1
