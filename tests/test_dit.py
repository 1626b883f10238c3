"""DiT and MMDiT against the paper's sizes, another library's network, and what must hold for any transformer."""
import functools
import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import filled, jit, normal

from diffusion_jax.nets.dit import Block, DiT, MMDiT, patchify, sincos_positions, unpatchify

FIXTURE = pathlib.Path(__file__).parent / 'fixtures' / 'dit.npz'
SMALL = functools.partial(DiT, width=16, depth=2, heads=2, num_classes=3)
JOINT = functools.partial(MMDiT, width=16, depth=2, heads=2)
SIZES = {'S/2': (384, 12, 6), 'B/2': (768, 12, 12), 'L/2': (1024, 24, 16), 'XL/2': (1152, 28, 16)}


def cond_of(net, batch, length=5):
  if isinstance(net, MMDiT):
    return {'text': normal(batch, length, 6, seed=3), 'text_mask': jnp.arange(length) < 1 + jnp.arange(batch)[:, None]}
  return {'label': jnp.arange(batch) % 3}


def shapes_of(net, *shape):
  return jax.eval_shape(lambda key: net.init(key, jnp.zeros(shape), jnp.zeros(shape[0]), cond_of(net, shape[0])),
                        jax.random.key(0))['params']


def outputs(net, params, x, cond=None, noise=None):
  noise = jnp.linspace(10.0, 900.0, len(x)) if noise is None else noise
  return np.asarray(jit(net.apply)({'params': params}, x, noise, cond_of(net, len(x)) if cond is None else cond))


# DiT


@pytest.mark.parametrize(('name', 'millions'), [('S/2', 33), ('B/2', 130), ('L/2', 458), ('XL/2', 675)])
def test_parameter_counts_are_the_papers(name, millions):
  """Peebles & Xie 2022, appendix, in millions; and to the last one, layer by layer (fixed positions are not any)."""
  width, depth, heads = SIZES[name]
  net = DiT(width, depth, heads, num_classes=1000, variance=True)
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes_of(net, 1, 32, 32, 4)))
  assert round(count / 1e6) == millions
  dense = lambda fan_in, fan_out: (fan_in + 1) * fan_out
  block = 4 * dense(width, width) + dense(width, 4 * width) + dense(4 * width, width) + dense(width, 6 * width)
  embeddings = dense(256, width) + dense(width, width) + 1001 * width + dense(2 * 2 * 4, width)
  assert count == depth * block + embeddings + dense(width, 2 * width) + dense(width, 2 * 2 * 8)


def test_equals_diffusers():
  """DiTTransformer2DModel with random parameters, the same level and label embedding in every block."""
  saved = np.load(FIXTURE)
  weights = {key.removeprefix('weights/'): saved[key] for key in saved.files if key.startswith('weights/')}
  block = 'transformer_blocks.{}.'
  emb = 'transformer_blocks.0.norm1.emb.'
  names = {'patches/embed': 'pos_embed.proj', 'embed/in': f'{emb}timestep_embedder.linear_1',
           'embed/out': f'{emb}timestep_embedder.linear_2', 'embed_label': f'{emb}class_embedder.embedding_table',
           'head/modulation': 'proj_out_1', 'head/out': 'proj_out_2'}
  for i in range(2):
    for ours, theirs in {'query': 'attn1.to_q', 'key': 'attn1.to_k', 'value': 'attn1.to_v', 'out': 'attn1.to_out.0',
                         'modulation': 'norm1.linear', 'mlp_in': 'ff.net.0.proj', 'mlp_out': 'ff.net.2'}.items():
      names[f'block_{i}/{ours}'] = block.format(i) + theirs

  def leaf(path, shape):
    *module, kind = (key.key for key in path)
    tensor = weights[names['/'.join(module)] + ('.bias' if kind == 'bias' else '.weight')]
    if kind == 'kernel':  # patches come to us row by row with the channels last, and to a convolution first
      tensor = np.moveaxis(tensor, (0, 1), (-1, -2)).reshape(-1, len(tensor))
    assert tensor.shape == shape.shape
    return jnp.asarray(tensor)

  x, noise, cond = saved['x'].transpose(0, 2, 3, 1), saved['timestep'], {'label': saved['label']}
  net = DiT(width=16, depth=2, heads=2, num_classes=5, variance=True)
  shapes = jax.eval_shape(net.init, jax.random.key(0), x, noise, cond)['params']
  params = jax.tree_util.tree_map_with_path(leaf, shapes)
  np.testing.assert_allclose(outputs(net, params, x, cond, noise), saved['output'].transpose(0, 2, 3, 1), atol=1e-4)


@pytest.mark.parametrize(('net', 'space'), [
    (SMALL(), (8,)), (SMALL(positions='learned'), (4, 6)), (SMALL(patch=(1, 2, 3), variance=True), (2, 4, 6)),
    (JOINT(positions='learned'), (8,)), (JOINT(patch=(1, 2, 2)), (2, 2, 4))])
def test_one_to_three_spatial_axes_keep_their_shape(net, space):
  shapes = shapes_of(net, 2, *space, 3)
  out = jax.eval_shape(lambda p, x: net.apply({'params': p}, x, jnp.zeros(2), cond_of(net, 2)), shapes,
                       jax.ShapeDtypeStruct((2, *space, 3), jnp.float32))
  assert (out.shape, out.dtype) == ((2, *space, 6 if net.variance else 3), jnp.float32)


@pytest.mark.parametrize(('space', 'sides'), [((6,), (2,)), ((4, 6), (2, 3)), ((2, 4, 4), (1, 2, 4))])
def test_patches_are_pieces_of_the_image_and_go_back(space, sides):
  x = normal(2, *space, 3)
  tokens = np.asarray(patchify(x, sides))
  np.testing.assert_array_equal(unpatchify(tokens, x.shape, sides), x)
  grid = [n // side for n, side in zip(space, sides, strict=True)]
  for i, place in enumerate(np.ndindex(*grid)):
    piece = x[(slice(None), *(slice(p * s, (p + 1) * s) for p, s in zip(place, sides, strict=True)))]
    np.testing.assert_array_equal(tokens[:, i], piece.reshape(2, -1))


@pytest.mark.parametrize('grid', [(9,), (3, 4), (2, 3, 4)])
def test_positions_are_all_different_and_of_known_size(grid):
  """sin^2 + cos^2 = 1 for every frequency; three axes leave two of 26 numbers empty."""
  places = np.asarray(sincos_positions(grid, 26))
  count = 26 // (2 * len(grid)) * len(grid)
  np.testing.assert_allclose((places ** 2).sum(1), count, rtol=1e-5)
  distances = np.linalg.norm(places[:, None] - places, axis=-1)
  assert distances[~np.eye(len(places), dtype=bool)].min() > 0.1
  assert not places[:, 2 * count:].any()


def test_the_last_axis_comes_first_in_positions():
  places = np.asarray(sincos_positions((3, 4), 8)).reshape(3, 4, 8)
  np.testing.assert_allclose(places[2, 3, ::2], [math.sin(3), math.cos(3), math.sin(2), math.cos(2)], atol=1e-6)
  assert (places[0] == places[0, :1])[:, 4:].all() and (places[:, 0] == places[:1, 0])[:, :4].all()


@pytest.mark.parametrize('net', [SMALL(depth=1, variance=True), JOINT(depth=1)], ids=['DiT', 'MMDiT'])
def test_zero_at_initialisation(net):
  """By the last layer alone, whatever the others hold."""
  x = normal(2, 4, 4, 3)
  last = jit(lambda key: net.init(key, x, jnp.ones(2), cond_of(net, 2))['params']['head']['out'])(jax.random.key(0))
  params = filled(shapes_of(net, *x.shape))
  assert np.abs(outputs(net, params, x)).max() > 0.1
  params['head']['out'] = last
  np.testing.assert_array_equal(outputs(net, params, x), np.zeros((2, 4, 4, 6 if net.variance else 3)))


def test_a_block_is_the_identity_at_initialisation():
  """adaLN-zero: every gate is shut."""
  h, emb = normal(2, 5, 16), normal(2, 16)
  out, _ = jit(lambda key: Block(16, 2, 4, 'float32').init_with_output(key, h, emb))(jax.random.key(0))
  np.testing.assert_array_equal(out, h)


@pytest.fixture(scope='module')
def apply():
  """apply(noise=, label=, drop=) of a small DiT whose parameters are random."""
  net, x = SMALL(), normal(4, 4, 4, 3)
  params = filled(shapes_of(net, *x.shape))
  run = jit(lambda noise, cond: net.apply({'params': params}, x, noise, cond))
  return lambda noise=500.0, label=0, drop=False: np.asarray(run(
      jnp.full(4, noise), {'label': jnp.broadcast_to(jnp.asarray(label), 4), 'drop': jnp.broadcast_to(drop, 4)}))


def test_output_depends_on_noise_and_label(apply):
  for a, b in itertools.combinations([apply(), apply(noise=501.0), apply(label=1), apply(label=2)], 2):
    assert np.abs(a - b).max() > 1e-3


def test_a_dropped_label_is_the_null_class(apply):
  null = apply(label=3)
  for label in range(3):
    np.testing.assert_array_equal(apply(label=label, drop=True), null)
  mixed = apply(label=jnp.arange(4) % 3, drop=jnp.array([True, False, False, True]))
  np.testing.assert_array_equal(mixed[[0, 3]], null[[0, 3]])
  np.testing.assert_array_equal(mixed[1], apply(label=1)[1])


@pytest.mark.parametrize('make', [SMALL, JOINT], ids=['DiT', 'MMDiT'])
def test_an_image_beside_the_input_counts(make):
  """As for super-resolution: channels that the patches have too, and the output has not."""
  net, x, image = make(depth=1, image=2), normal(2, 4, 4, 3), normal(2, 4, 4, 2, seed=5)
  cond = cond_of(net, 2) | {'image': image}
  params = filled(jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(2), cond)['params'])
  changed = np.stack([image[0] + 1, image[1]])
  base, other = outputs(net, params, x, cond), outputs(net, params, x, cond | {'image': changed})
  assert base.shape == x.shape and np.abs(base - other)[0].max() > 1e-2
  np.testing.assert_array_equal(base[1], other[1])


# Options that change no number


def loss_of(net):
  return lambda params, x: jnp.mean(net.apply(
      {'params': params}, x, jnp.linspace(10.0, 900.0, len(x)), cond_of(net, len(x))).astype(jnp.float32) ** 2)


def close(a, b, tolerance=1e-5):
  for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(one, other, atol=tolerance, rtol=tolerance)


def stacked(params):
  """Parameters of separate blocks as those of a loop over them."""
  blocks = [params[f'block_{i}'] for i in range(2)]
  rest = {name: value for name, value in params.items() if not name.startswith('block_')}
  return {**rest, 'blocks': jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def test_a_scan_over_blocks_is_the_same_function():
  """Its gradients too, and when the blocks are computed again for them."""
  plain, scanned, x = SMALL(), SMALL(scan=True, remat='blocks'), normal(2, 4, 4, 3)
  params = filled(shapes_of(plain, *x.shape))
  assert jax.tree.map(jnp.shape, stacked(params)) == jax.tree.map(jnp.shape, shapes_of(scanned, *x.shape))
  value, grads = jit(jax.value_and_grad(loss_of(plain)))(params, x)
  other, other_grads = jit(jax.value_and_grad(loss_of(scanned)))(stacked(params), x)
  close((value, stacked(grads)), (other, other_grads))


def test_scanned_blocks_start_different():
  """One program, but each block draws its own parameters, at the scale of one block."""
  init = lambda key: SMALL(scan=True).init(key, jnp.zeros((1, 4, 4, 3)), jnp.zeros(1), {'label': jnp.zeros(1, int)})
  kernel = jit(lambda key: init(key)['params']['blocks']['mlp_in']['kernel'])(jax.random.key(0))
  assert kernel.shape == (2, 16, 64) and np.abs(kernel[0] - kernel[1]).max() > 0.01
  assert np.abs(kernel).max() == pytest.approx(math.sqrt(6 / (16 + 64)), rel=0.02)  # Glorot's uniform


@pytest.mark.parametrize('make', [SMALL, JOINT], ids=['DiT', 'MMDiT'])
def test_remat_keeps_less_for_the_gradient(make):
  x, kept = normal(2, 8, 8, 3), []
  for remat in ('none', 'blocks'):
    loss, shapes = loss_of(make(remat=remat)), shapes_of(make(), *x.shape)
    pullback = jax.eval_shape(lambda params, loss=loss: jax.vjp(lambda p: loss(p, x), params)[1], shapes)
    kept.append(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(pullback)))
  assert kept[1] < 0.6 * kept[0]


def test_remat_computes_the_same():
  x, nets = normal(2, 4, 4, 3), [JOINT(remat=remat) for remat in ('none', 'blocks')]
  params = filled(shapes_of(nets[0], *x.shape))
  close(*(jit(jax.grad(loss_of(net)))(params, x)['patches'] for net in nets))  # where every block's gradient arrives


@pytest.mark.parametrize('make', [SMALL, functools.partial(SMALL, scan=True), JOINT], ids=['DiT', 'scan', 'MMDiT'])
def test_bfloat16_keeps_parameters_and_gradients_float32(make):
  x, low = normal(2, 4, 4, 3), make(dtype='bfloat16')
  shapes = shapes_of(low, *x.shape)
  grads = jax.eval_shape(jax.grad(loss_of(low)), shapes, x)
  assert {leaf.dtype for leaf in jax.tree.leaves((shapes, grads))} == {jnp.dtype('float32')}


@pytest.mark.parametrize('make', [SMALL, JOINT], ids=['DiT', 'MMDiT'])
def test_bfloat16_is_close_to_float32_and_not_float32(make):
  x = normal(2, 4, 4, 3)
  params = filled(shapes_of(make(depth=1), *x.shape))
  full, low = outputs(make(depth=1), params, x), outputs(make(depth=1, dtype='bfloat16'), params, x)
  assert low.dtype == np.float32
  assert 2e-4 < np.linalg.norm(low - full) / np.linalg.norm(full) < 5e-2


# MMDiT


@pytest.fixture(scope='module')
def joint():
  """run(text, mask, drop) of a small MMDiT, and a text of five tokens of which three, and two, are no padding."""
  net, x = JOINT(), normal(2, 4, 4, 3)
  params = filled(shapes_of(net, *x.shape))
  run = jit(lambda cond: net.apply({'params': params}, x, jnp.full(2, 300.0), cond))
  text, mask = normal(2, 5, 6, seed=4), np.array([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], bool)
  return lambda text=text, mask=mask, **more: np.asarray(run({'text': text, 'text_mask': mask, **more})), text, mask


def test_padding_changes_nothing(joint):
  """Neither the order of padded tokens nor what they hold."""
  run, text, mask = joint
  swapped = text.copy()
  swapped[:, 3:] = text[:, [4, 3]]
  np.testing.assert_array_equal(run(swapped), run())
  np.testing.assert_array_equal(run(np.where(mask[..., None], text, 100.0)), run())
  np.testing.assert_allclose(run(text[:, :3], mask[:, :3]), run(), atol=1e-5)


def test_every_token_of_the_text_counts(joint):
  run, text, mask = joint
  for i in range(2):
    for j in range(int(mask[i].sum())):
      changed = text.copy()
      changed[i, j] += 1
      assert np.abs(run(changed) - run())[i].max() > 1e-3
      np.testing.assert_array_equal(run(changed)[1 - i], run()[1 - i])


def test_a_dropped_text_is_one_learned_token_whatever_it_was(joint):
  run, text, mask = joint
  dropped = run(drop=np.array([True, False]))
  np.testing.assert_array_equal(dropped[1], run()[1])
  assert np.abs(dropped - run())[0].max() > 1e-3
  np.testing.assert_array_equal(run(text + 1, ~mask, drop=np.array([True, True])), run(drop=np.array([True, True])))


def test_an_empty_text_is_finite(joint):
  assert np.isfinite(joint[0](mask=np.zeros((2, 5), bool))).all()


@pytest.mark.parametrize(('make', 'words'), [
    (lambda: DiT(width=16, heads=3), 'heads must divide width: width 16, heads 3'),
    (lambda: DiT(depth=0), 'width, depth and mlp must be at least 1, got 1152, 0 and 4'),
    (lambda: DiT(patch=0), 'patch must be at least 1 along every axis, got 0'),
    (lambda: DiT(positions='none'), "positions must be 'sincos' or 'learned', got 'none'"),
    (lambda: DiT(num_classes=-1), 'num_classes must be at least 0, got -1'),
    (lambda: MMDiT(dtype='float16'), "dtype must be 'float32' or 'bfloat16', got 'float16'"),
    (lambda: DiT(image=-1), 'image must be at least 0, got -1'),
    (lambda: DiT(remat='all'), "remat must be 'none' or 'blocks', got 'all'"),
    (lambda: shapes_of(SMALL(patch=3), 1, 9, 8, 3), r'patches of \(3, 3\) must divide .* got sizes \(9, 8\)'),
    (lambda: shapes_of(SMALL(patch=(2, 2)), 1, 8, 3), r'patches of \(2, 2\) must divide .* got sizes \(8,\)'),
])
def test_bad_arguments_are_named_with_both_values(make, words):
  with pytest.raises(ValueError, match=words):
    make()
