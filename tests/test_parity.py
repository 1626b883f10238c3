"""What we write, diffusers and transformers load: nothing missing, nothing left over, the same output.

Needs the extra `parity`; without it these tests are skipped. What they write and we read is in the fixtures.
"""
import json

import jax.numpy as jnp
import numpy as np
import pytest
from nets import filled, jit, normal

from diffusion_jax.convert import autoencoder, clip, files, unet2d, unet_condition
from diffusion_jax.nets.autoencoder import AutoencoderKL
from diffusion_jax.nets.clip import CLIPText
from diffusion_jax.nets.text_unet import TextUNet
from diffusion_jax.nets.unet import ADM, UNet

WHY = '{} missing: install the parity extra'
LOADED = {'missing_keys', 'unexpected_keys', 'mismatched_keys', 'error_msgs'}


def loaded(library, name, folder):
  """The model of a folder in the other library, without gradients, and torch."""
  torch = pytest.importorskip('torch', reason=WHY.format('torch'))
  module = pytest.importorskip(library, reason=WHY.format(library))
  model, report = getattr(module, name).from_pretrained(folder, output_loading_info=True, local_files_only=True)
  assert set(report) == LOADED and not any(report.values())
  return model.eval().requires_grad_(False), torch


def first(x, torch):
  """Channels last -> first, as a tensor."""
  return torch.tensor(np.moveaxis(np.asarray(x), -1, 1).copy())


@pytest.mark.parametrize('net', [
    UNet(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), groups=4),
    UNet(channels=8, multipliers=(1, 1, 2), blocks=2, attention=(8, 2), groups=4, num_classes=2, variance=True),
    ADM(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), groups=4, num_classes=3, head_channels=4)])
def test_unet2d(net, tmp_path):
  params = filled(unet2d.shapes(net, 8))
  files.write(tmp_path, unet2d.config(net, 8), unet2d.to_theirs(net, params), 'diffusion_pytorch_model')
  model, torch = loaded('diffusers', 'UNet2DModel', tmp_path)
  x, noise, label = normal(2, 8, 8, 3), np.array([7.0, 900.0], np.float32), np.array([0, 2])
  ours = jit(net.apply)({'params': params}, x, noise, {'label': label})
  theirs = model(first(x, torch), torch.tensor(noise), class_labels=torch.tensor(label) if net.num_classes else None)
  np.testing.assert_allclose(first(ours, torch), theirs.sample, atol=1e-4)


@pytest.mark.parametrize(('net', 'linear'), [
    (TextUNet(channels=4, multipliers=(1, 2), blocks=1, groups=2, depth=(1, 0), heads=2, text=6, image=1), False),
    (TextUNet(channels=4, multipliers=(1, 2), blocks=1, groups=2, depth=(0, 2), heads=(1, 2), text=6), True)])
def test_unet_condition(net, linear, tmp_path):
  params = filled(unet_condition.shapes(net))
  tensors = unet_condition.to_theirs(net, params, linear=linear)
  files.write(tmp_path, unet_condition.config(net, 8, linear=linear), tensors, 'diffusion_pytorch_model')
  model, torch = loaded('diffusers', 'UNet2DConditionModel', tmp_path)
  x, image, noise, text = normal(2, 8, 8, 4), normal(2, 8, 8, net.image), np.array([7.0, 900.0]), normal(2, 3, 6)
  ours = jit(net.apply)({'params': params}, x, noise, {'text': text, 'image': image})
  theirs = model(first(np.concatenate([x, image], -1), torch), torch.tensor(noise), torch.tensor(text))
  np.testing.assert_allclose(first(ours, torch), theirs.sample, atol=1e-4)


@pytest.mark.parametrize('net', [
    AutoencoderKL(channels=(4, 8), blocks=1, latent=2, groups=2),
    AutoencoderKL(channels=(8, 8, 4), groups=4, scaling=1.5305, shift=0.0609, quant=False, post_quant=False)])
def test_autoencoder(net, tmp_path):
  params = filled(autoencoder.shapes(net))
  files.write(tmp_path, autoencoder.config(net, 16), autoencoder.to_theirs(net, params), 'diffusion_pytorch_model')
  model, torch = loaded('diffusers', 'AutoencoderKL', tmp_path)
  assert (model.config.scaling_factor, model.config.shift_factor or 0.0) == (net.scaling, net.shift)
  x, z = normal(2, 16, 8, 3), normal(2, 4, 2, net.latent)
  mean, decoded = jit(lambda params: (net.apply({'params': params}, x, method='encode').mean,
                                      net.apply({'params': params}, z, method='decode')))(params)
  np.testing.assert_allclose(first(mean, torch), model.encode(first(x, torch)).latent_dist.mean, atol=1e-4)
  np.testing.assert_allclose(first(decoded, torch), model.decode(first(z, torch)).sample, atol=1e-4)


@pytest.mark.parametrize(('net', 'name'), [
    (CLIPText(vocabulary=60, width=16, depth=2, heads=2, mlp=24), 'CLIPTextModel'),
    (CLIPText(vocabulary=60, width=16, depth=1, heads=4, mlp=24, activation='gelu', end=58, projection=6),
     'CLIPTextModelWithProjection')])
def test_clip(net, name, tmp_path):
  params = filled(clip.shapes(net))
  files.write(tmp_path, clip.config(net), clip.to_theirs(net, params), 'model')
  assert json.loads((tmp_path / 'config.json').read_text())['architectures'] == [name]
  model, torch = loaded('transformers', name, tmp_path)
  ids = np.random.default_rng(0).integers(1, 57, (2, 9))
  ids[0, 4] = ids[1, 7] = 58
  ours, theirs = jit(net.apply)({'params': params}, jnp.asarray(ids)), model(torch.tensor(ids))
  np.testing.assert_allclose(ours.text, theirs.last_hidden_state, atol=1e-4)
  if net.projection:
    np.testing.assert_allclose(ours.projected, theirs.text_embeds, atol=1e-4)
  else:
    np.testing.assert_allclose(ours.pooled, theirs.pooler_output, atol=1e-4)
