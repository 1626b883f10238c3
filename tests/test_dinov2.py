"""DINOv2 against the original code's and transformers' numbers, and what each known mistake would cost."""
import math
import pathlib
import re

import fidgen
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from diffusion_jax.metrics import dinov2
from diffusion_jax.metrics import weights as files

EXPECTED = np.load(pathlib.Path(__file__).parent / 'fixtures' / 'dinov2.npz')
TOLERANCE = 1e-5  # of the largest feature; float32 alone costs 2e-6, every mistake below more than 15 tolerances
WIDTH, DEPTH, HEADS, MLP, GRID = 128, 3, 2, 384, 37
# Of the layers in a block: attention tells tokens apart, and the dense layers see their activation's shape.
GAIN = {'qkv': 4, 'proj': 2, 'fc1': 3, 'fc2': 16}


def state_dict():
  """{the original's name: float32 array} of a small DINOv2, whose every parameter matters, down to EPSILON."""
  shapes = {'cls_token': (1, 1, WIDTH), 'pos_embed': (1, 1 + GRID ** 2, WIDTH), 'mask_token': (1, WIDTH),
            'patch_embed.proj.weight': (WIDTH, 3, 14, 14), 'norm.weight': (WIDTH,)}
  block = {'attn.qkv.weight': (3 * WIDTH, WIDTH), 'attn.proj.weight': (WIDTH, WIDTH), 'mlp.fc1.weight': (MLP, WIDTH),
           'mlp.fc2.weight': (WIDTH, MLP), 'norm1.weight': (WIDTH,), 'norm2.weight': (WIDTH,), 'ls1.gamma': (WIDTH,),
           'ls2.gamma': (WIDTH,)}
  shapes |= {f'blocks.{i}.{name}': shape for i in range(DEPTH) for name, shape in block.items()}
  shapes |= {name.replace('weight', 'bias'): shape[:1] for name, shape in shapes.items() if name.endswith('weight')}
  arrays = {}
  for name, shape in shapes.items():
    *_, layer, end = ('', *name.split('.'))
    centre = 0.5 if end == 'gamma' else float('norm' in layer and end == 'weight')
    spread = GAIN[layer] / math.sqrt(shape[1]) if len(shape) == 2 and layer else 0.25
    if not name.startswith(('blocks', 'norm')):
      spread = 1 / 256 if len(shape) == 4 else 1 / 16  # small, so that EPSILON is seen
    arrays[name] = (centre + spread * fidgen.uniform(f'dinov2:{name}', shape)).astype(np.float32)
  return arrays


@pytest.fixture(scope='module')
def original():
  return state_dict()


@pytest.fixture(scope='module')
def params(original):
  return dinov2.from_arrays(original)


@pytest.fixture(scope='module')
def images():
  return {size: fidgen.images(size, n) for size, n in ((32, 3), (224, 1), (299, 2))}


def distance(found, expected):
  """The largest error, relative to the largest expected value."""
  return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


def network(params, x, **changes):
  model = dinov2.settings(params).clone(**changes)
  return jax.jit(lambda params, x: model.apply({'params': params}, x))(params, x)


@pytest.mark.parametrize('size', [32, 224, 299])
def test_features_are_the_original_codes(params, images, size):
  found, expected = dinov2.extract(params, images[size], batch_size=2), EXPECTED[f'b{size}/hub']
  assert found.shape == expected.shape == (len(images[size]), WIDTH) and found.dtype == np.float32
  assert distance(found, expected) < TOLERANCE


def test_without_an_offset_features_are_transformers(params, images):
  x = jnp.concatenate([dinov2.prepare(images[size]) for size in (32, 299)])
  expected = np.concatenate([EXPECTED[f'b{size}/transformers'] for size in (32, 299)])
  assert distance(network(params, x, offset=0.0), expected) < TOLERANCE
  assert distance(network(params, x), expected) > 15 * TOLERANCE


def test_other_numbers_of_heads_and_patches(params, images):
  """Eight heads, and 16 x 8 patches."""
  small, large = (dinov2.prepare(images[size][:1]) for size in (32, 299))
  assert distance(network(params, small, heads=8), EXPECTED['heads8/hub']) < TOLERANCE
  assert distance(network(params, large[:, :, :112]), EXPECTED['tall/hub']) < TOLERANCE


def whole(images):
  """What `prepare` gives, in 0..255 again."""
  return dinov2.prepare(images) * 255 * jnp.asarray(dinov2.STD) + 255 * jnp.asarray(dinov2.MEAN)


def normalised(x, mean=dinov2.MEAN, std=dinov2.STD):
  return (x / 255 - jnp.asarray(mean)) / jnp.asarray(std)


def resized(x, method, antialias, size=224):
  return normalised(jax.image.resize(x.astype(np.float32), (len(x), size, size, 3), method, antialias=antialias))


WRONG_INPUTS = {
    'no antialias': lambda x: resized(x, 'cubic', False),
    'bilinear resize': lambda x: resized(x, 'linear', True),
    'resize rounded to integers': lambda x: normalised(jnp.round(whole(x))),
    'resize clipped': lambda x: normalised(jnp.clip(whole(x), 0, 255)),
    'blue first': lambda x: dinov2.prepare(x[..., ::-1]),
    'scale to -1..1': lambda x: normalised(whole(x), 0.5, 0.5),
}


@pytest.mark.parametrize('mistake', WRONG_INPUTS)
def test_a_wrong_input_is_seen(params, images, mistake):
  features = lambda prepare: dinov2._network(params, jnp.concatenate([prepare(images[size]) for size in (32, 299)]))
  expected = np.concatenate([EXPECTED['b32/hub'], EXPECTED['b299/hub']])
  assert distance(features(lambda x: normalised(whole(x))), expected) < TOLERANCE
  assert distance(features(WRONG_INPUTS[mistake]), expected) > 15 * TOLERANCE


def in_blocks(change):
  return lambda params: {module: leaves | change(leaves) if module.startswith('block') else leaves
                         for module, leaves in params.items()}


def reordered(*parts):
  """The parts of qkv in another order, which is a permutation of its output channels."""
  order = np.concatenate([np.arange(part * WIDTH, (part + 1) * WIDTH) for part in parts])
  return in_blocks(lambda leaves: {'qkv': {name: leaf[..., order] for name, leaf in leaves['qkv'].items()}})


def with_positions(change):
  return lambda params: params | {'positions': change(params['positions'])}


def transposed(x, *shape):
  return x.reshape(*shape).swapaxes(0, 1).reshape(x.shape)


WRONG_PARAMETERS = {
    'no layer scale': in_blocks(lambda leaves: {'scale1': np.ones_like(leaves['scale1'])}),
    'layer scales exchanged': in_blocks(lambda leaves: {'scale1': leaves['scale2'], 'scale2': leaves['scale1']}),
    'patches transposed': lambda params: params | {'patch': params['patch'] | {
        'kernel': transposed(params['patch']['kernel'], 14, 14, -1)}},
    'positions transposed': with_positions(lambda x: np.concatenate([x[:1], transposed(x[1:], GRID, GRID, -1)])),
    'no position for the class token': with_positions(lambda x: np.concatenate([0 * x[:1], x[1:]])),
    'query and key exchanged': reordered(1, 0, 2),
    'key and value exchanged': reordered(0, 2, 1),
    'bfloat16': lambda params: jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), params),
}


@pytest.mark.parametrize('mistake', WRONG_PARAMETERS)
def test_wrong_parameters_are_seen(params, images, mistake):
  found = dinov2._network(WRONG_PARAMETERS[mistake](params), dinov2.prepare(images[299]))
  assert distance(found, EXPECTED['b299/hub']) > 15 * TOLERANCE


def keys_cubic(length, size, offset):
  """The interpolation of positions with a = -0.5."""
  return jax.image.scale_and_translate(jnp.eye(length), (size, length), (0,), jnp.asarray([(size + offset) / length]),
                                       jnp.zeros(1), 'cubic', antialias=False)


WRONG_NETWORKS = {
    'tanh GELU': lambda patch: patch.setattr(nn, 'gelu', lambda x, approximate: jax.nn.gelu(x)),
    'epsilon of 1e-5': lambda patch: patch.setattr(dinov2, 'EPSILON', 1e-5),
    'heads of 32 channels': lambda patch: patch.setattr(dinov2, 'HEAD', 32),
    'positions with a = -0.5': lambda patch: patch.setattr(dinov2, 'interpolation', keys_cubic),
}


@pytest.mark.parametrize('mistake', WRONG_NETWORKS)
def test_a_wrong_network_is_seen(params, images, monkeypatch, mistake):
  WRONG_NETWORKS[mistake](monkeypatch)
  assert distance(network(params, dinov2.prepare(images[299])), EXPECTED['b299/hub']) > 15 * TOLERANCE


@pytest.mark.parametrize(('height', 'width'), [(40, 9), (13, 61), (299, 300)])
def test_resize_is_pytorchs(height, width):
  """To 28 pixels, up and down."""
  x = fidgen.images(300, 1)[:, :height, :width]
  expected = EXPECTED[f'resize/{height}x{width}']
  assert distance(dinov2.prepare(x, 28), expected) < TOLERANCE
  assert distance(resized(x, 'cubic', False, 28), expected) > 0.1


def test_resize_keeps_what_needs_no_change():
  x = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
  expected = (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  np.testing.assert_allclose(dinov2.prepare(x), expected, atol=1e-5)
  flat = np.broadcast_to(x[:1, :1, :1], (1, 37, 500, 3))
  np.testing.assert_allclose(dinov2.prepare(flat), np.broadcast_to(expected[:1, :1, :1], (1, 224, 224, 3)), atol=1e-5)


@pytest.mark.parametrize('scale', [4, 0.25])
def test_resize_of_a_ramp_is_the_ramp(scale):
  """Away from the edges, with pixel i at i + 1/2, up and down."""
  ramp = np.arange(56, dtype=np.uint8) * 4
  x = np.broadcast_to(ramp[:, None, None], (1, 56, 56, 1))
  size = int(56 * scale)
  found = (np.asarray(dinov2.prepare(x, size)) * dinov2.STD + dinov2.MEAN) * 255
  expected = np.broadcast_to((((np.arange(size) + 0.5) / scale - 0.5) * 4)[:, None, None], found[0].shape)
  edge = round(3 * max(scale, 1))
  np.testing.assert_allclose(found[0, edge:-edge], expected[edge:-edge], atol=2e-3)


@pytest.mark.parametrize(('name', 'size', 'offset'), [('0.1', 16, 0.1), ('0.0', 16, 0.0), ('45', 45, 0.1)])
def test_positions_are_interpolated_as_by_pytorch(name, size, offset):
  grid, expected = fidgen.uniform('dinov2:grid', (1, 2, GRID, GRID))[0], EXPECTED[f'positions/{name}']
  matrix = dinov2.interpolation(GRID, size, offset)
  np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
  assert distance(matrix @ grid @ matrix.T, expected) < TOLERANCE


def test_as_many_positions_as_patches_are_taken_as_they_are():
  """Without the interpolation, which would shift them by the offset."""
  np.testing.assert_allclose(dinov2.interpolation(16, 16, 0.0), np.eye(16), atol=1e-7)
  assert np.abs(dinov2.interpolation(16, 16, 0.1) - np.eye(16)).max() > 0.01
  x = fidgen.uniform('dinov2:positions', (16, WIDTH)).astype(np.float32)
  np.testing.assert_array_equal(dinov2.DINOv2(grid=4)._resized(x, 4, 4), x)


def test_results_depend_neither_on_the_batch_nor_on_grey_being_stored_once(params, images):
  """Not on the batch's size, nor on what else is in it, and a batch that is not full adds nothing."""
  x = images[32]
  pairs = dinov2.extract(params, x, batch_size=2)
  assert len(pairs) == len(x) == 3
  assert distance(dinov2.extract(params, x, batch_size=1), pairs) < TOLERANCE
  assert distance(dinov2.extract(params, x[::-1], batch_size=2)[::-1], pairs) < TOLERANCE
  assert distance(pairs[2], pairs[0]) > 0.1

  grey = dinov2.extract(params, x[..., :1], batch_size=2)
  assert distance(grey, dinov2.extract(params, np.repeat(x[..., :1], 3, -1), batch_size=2)) < TOLERANCE
  assert distance(grey, pairs) > 0.01


@pytest.mark.parametrize('bad', [
    np.zeros((2, 32, 32, 3), np.float32), np.zeros((2, 3, 32, 32), np.uint8), np.zeros((32, 32, 3), np.uint8),
    np.zeros((2, 32, 32, 4), np.uint8), np.zeros((0, 32, 32, 3), np.uint8)])
def test_bad_images_and_batch_sizes_are_named(bad):
  with pytest.raises(ValueError, match='takes images uint8'):
    dinov2.extract({}, bad)
  with pytest.raises(ValueError, match='batch_size must be at least 1, got 0'):
    dinov2.extract({}, np.zeros((2, 32, 32, 3), np.uint8), batch_size=0)


@pytest.fixture(scope='module')
def hugging(original):
  """The same weights as Hugging Face names and cuts them."""
  renamed = (('^(cls|mask)_token', r'embeddings.\1_token'), ('^pos_embed', 'embeddings.position_embeddings'),
             ('^norm', 'layernorm'), ('^patch_embed.proj', 'embeddings.patch_embeddings.projection'),
             ('^blocks', 'encoder.layer'), ('attn.proj', 'attention.output.dense'),
             (r'ls(\d).gamma', r'layer_scale\1.lambda1'), ('attn.qkv', 'attention.attention.query'))
  arrays = {}
  for name, array in original.items():
    for before, after in renamed:
      name = re.sub(before, after, name)
    arrays[name] = array
    if 'query' in name:
      for part, rows in zip(('query', 'key', 'value'), np.split(array, 3), strict=True):
        arrays[name.replace('query', part)] = rows
  return arrays


def test_both_kinds_of_names_give_the_same_parameters(original, hugging, params, tmp_path):
  safetensors.numpy.save_file(hugging, tmp_path / 'model.safetensors')
  for arrays in (files.read(tmp_path / 'model.safetensors'), {f'dinov2.{name}': x for name, x in hugging.items()},
                 {name: x for name, x in original.items() if name != 'mask_token'}):
    jax.tree.map(np.testing.assert_array_equal, dinov2.from_arrays(arrays), params)
  assert dinov2.settings(params) == dinov2.DINOv2(width=WIDTH, depth=DEPTH, heads=HEADS, mlp=MLP, grid=GRID, offset=0.1)


@pytest.mark.parametrize(('width', 'depth', 'count'), [
    (384, 12, 22_056_192), (768, 12, 86_579_712), (1024, 24, 304_367_616)])
def test_released_models_have_transformers_count_of_parameters(width, depth, count):
  """ViT-S/14, B/14 and L/14. Only the shapes of what tells the settings are looked at here."""
  arrays = {'cls_token': np.zeros((1, 1, width)), 'pos_embed': np.zeros((1, 1370, width))}
  arrays |= {f'blocks.{i}.mlp.fc1.weight': np.zeros((4 * width, 1)) for i in range(depth)}
  assert sum(math.prod(shape) for shape in dinov2._shapes(arrays, False).values()) == count


WRONG_WEIGHTS = [
    ('norm.bias', None, r"lack 'norm.bias' \(1 of 48 names\)"),
    ('blocks.4.norm1.bias', np.zeros(WIDTH, np.float32), 'lack'),
    ('head.weight', np.zeros(3, np.float32), "no 'head.weight'"),
    ('cls_token', None, "no 'cls_token' of 3 dimensions"),
    ('blocks.0.mlp.fc1.weight', np.zeros(3, np.float32), "no 'blocks.0.mlp.fc1.weight' of 2 dimensions"),
    ('patch_embed.proj.weight', np.zeros((WIDTH, 3, 16, 16), np.float32),
     r"'patch_embed.proj.weight' must have the shape \[128, 3, 14, 14\], got \[128, 3, 16, 16\]"),
    ('blocks.2.attn.qkv.weight', np.zeros((WIDTH, WIDTH), np.float32), r'the shape \[384, 128\], got \[128, 128\]'),
    ('pos_embed', np.zeros((1, 1374, WIDTH), np.float32), 'a square of positions .* got 128 and 1374'),
    ('cls_token', np.zeros((1, 1, 96), np.float32), 'a multiple of 64 channels .* got 96'),
    ('norm.bias', np.zeros(WIDTH, np.int32), "'norm.bias' must hold finite floating-point numbers, got int32"),
    ('norm.bias', np.full(WIDTH, np.nan, np.float32), "'norm.bias' must hold finite"),
    ('register_tokens', np.zeros((1, 4, WIDTH), np.float32), 'a DINOv2 with register tokens'),
    ('blocks.0.mlp.w12.weight', np.zeros((768, WIDTH), np.float32), 'a DINOv2 with SwiGLU')]


@pytest.mark.parametrize(('name', 'array', 'message'), WRONG_WEIGHTS)
def test_weights_that_do_not_fit_are_named(original, name, array, message):
  with pytest.raises(ValueError, match=message):
    dinov2.from_arrays({key: x for key, x in (original | {name: array}).items() if x is not None})


def test_hugging_faces_weights_that_do_not_fit_are_named(hugging):
  key = 'encoder.layer.1.attention.attention.key.weight'
  with pytest.raises(ValueError, match=rf"'{key}' must have the shape \[128, 128\], got \[384, 128\]"):
    dinov2.from_arrays(hugging | {key: np.zeros((384, 128), np.float32)})


def test_transformers_itself(images, tmp_path):
  """Its own random weights, through the files that it writes; and PyTorch's own resize."""
  torch = pytest.importorskip('torch', reason='torch missing: install the parity extra')
  transformers = pytest.importorskip('transformers', reason='transformers missing: install the parity extra')
  torch.manual_seed(0)
  settings = transformers.Dinov2Config(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, mlp_ratio=2,
                                       image_size=518, patch_size=14, layerscale_value=0.7)
  model = transformers.Dinov2Model(settings).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.1 * torch.randn_like(parameter)
    x = torch.from_numpy(images[299]).permute(0, 3, 1, 2).float()
    x = torch.nn.functional.interpolate(x, size=(224, 224), mode='bicubic', antialias=True) / 255
    x = (x - torch.tensor(dinov2.MEAN)[:, None, None]) / torch.tensor(dinov2.STD)[:, None, None]
    expected = model(pixel_values=x).pooler_output.numpy()
  model.save_pretrained(tmp_path)
  params = dinov2.from_arrays(files.read(tmp_path / 'model.safetensors'))
  assert dinov2.settings(params) == dinov2.DINOv2(WIDTH, 2, HEADS, 2 * WIDTH)
  assert distance(network(params, dinov2.prepare(images[299]), offset=0.0), expected) < TOLERANCE
