"""Adapters: what they are at the start, what merging them means, and that unmerging forgets nothing."""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from nets import filled, jit, normal, shapes_of

from diffusion_jax.convert import clip, unet_condition
from diffusion_jax.nets import edm2, lora
from diffusion_jax.nets.clip import CLIPText
from diffusion_jax.nets.dit import DiT, MMDiT
from diffusion_jax.nets.layers import Conv, Dense
from diffusion_jax.nets.text_unet import TextUNet
from diffusion_jax.nets.unet import ADM, DDPMpp, UNet

KEY = jax.random.key(0)
EVERY = '/kernel$|^kernel$'
SMALL = UNet(channels=4, multipliers=(1,), blocks=1, attention=(), groups=2, dropout=0.0)
READER = TextUNet(channels=4, multipliers=(1,), blocks=1, groups=2, depth=(0,), heads=2, text=5)
merge = jit(lora.merge, static_argnames='keep')  # one program, and not one for the shape of every kernel


def mmdit():
  x, noise, text = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 8, 8, 4), (1,), (1, 3, 5)))
  return jax.eval_shape(MMDiT(8, 1, 2).init, KEY, x, noise, {'text': text})['params']


FAMILIES = {
    'unet in three dimensions': lambda: shapes_of(SMALL, (1, 4, 4, 4, 1)),
    'ddpmpp': lambda: shapes_of(DDPMpp(channels=4, multipliers=(1, 1), blocks=1, groups=2), (1, 8, 8, 3)),
    'adm': lambda: shapes_of(ADM(channels=4, multipliers=(1, 1), blocks=1, groups=2, head_channels=2, num_classes=3),
                             (1, 8, 8, 3)),
    'text_unet': lambda: unet_condition.shapes(READER),
    'dit': lambda: shapes_of(DiT(8, 1, 2, num_classes=3), (1, 8, 8, 3)),
    'scanned dit': lambda: shapes_of(DiT(8, 2, 2, scan=True), (1, 8, 8, 3)),
    'mmdit': mmdit,
    'clip': lambda: clip.shapes(CLIPText(vocabulary=9, width=8, depth=2, heads=2, mlp=16, length=4, projection=4)),
    'edm2': lambda: shapes_of(edm2.UNet(channels=4, multipliers=(1, 1), blocks=1, head_channels=4), (1, 8, 8, 3)),
}


def kernels(tree):
  return {path[:-1]: leaf for path, leaf in flatten_dict(tree).items() if path[-1] == 'kernel'}


def adapters_of(shapes, rank, pattern=EVERY, seed=2):
  """Adapters as if they had been trained: no `up` is zero any more."""
  adapters = jax.eval_shape(lambda: lora.init(KEY, shapes, rank, pattern))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape) / np.sqrt(a.shape[-2]), jnp.float32), adapters)


def bits(tree):
  return {path: (leaf.shape, leaf.dtype, np.asarray(leaf).tobytes()) for path, leaf in flatten_dict(tree).items()}


# What adapters are


@pytest.mark.parametrize('family', FAMILIES)
def test_every_kernel_of_every_network_can_be_adapted(family):
  """It and nothing else changes; with `up` at zero, as in the beginning, the parameters are what they were."""
  shapes = FAMILIES[family]()
  params, adapters = filled(shapes), adapters_of(shapes, 2)
  assert set(lora.modules(adapters)) == set(kernels(params))
  before, after = bits(params), bits(merge(params, adapters))
  assert {path for path in before if before[path] != after[path]} == {(*path, 'kernel') for path in kernels(params)}
  zero = jax.tree_util.tree_map_with_path(lambda path, a: a * (path[-1].key == 'down'), adapters)
  assert bits(merge(params, zero)) == before
  usual = lora.modules(adapters_of(shapes, 2, lora.ATTENTION))
  assert usual and all((*path[:-1], 'query') in usual or 'attention' in path[-2] or 'attention' in path[-1]
                       for path in usual)


def test_adapters_begin_with_nothing_to_add():
  """And their numbers depend on their path alone; those of down have the variance 1 / (3 fan_in) of a uniform draw."""
  shapes = {name: {'kernel': jax.ShapeDtypeStruct((3, 3, 40, 8), jnp.float32)} for name in ('down', 'up', 'up_2')}
  shapes['blocks'] = {'kernel': jax.ShapeDtypeStruct((40, 360, 8), jnp.float32)}  # 40 of them, in one loop
  many, few = jit(lambda: (lora.init(KEY, shapes, 64, EVERY), lora.init(KEY, shapes, 64, 'up')))()
  assert bits(few).items() < bits(many).items()
  assert not any(module['up'].any() for module in lora.modules(many).values())
  rows = {tuple(module['down'].ravel()[:4].tolist()) for module in lora.modules(many).values()}
  assert len(rows) == 4
  for down in (many['down']['down'], many['blocks']['down']):
    assert abs(down.var() * 3 * 360 - 1) < 0.05 and abs(down).max() <= 360 ** -0.5


def test_sizes_are_in_closed_form():
  """Rank 4 on the attention of Stable Diffusion 1: per block 8 products of (inputs + outputs) 4 numbers each, of which
  keys and values of the text have 768 inputs; 16 blocks with 5 x 320, 5 x 640 and 6 x 1280 channels."""
  shapes = unet_condition.shapes(TextUNet())
  size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  count = lambda *a: size(jax.eval_shape(lambda: lora.init(KEY, shapes, *a)))
  assert count(4, '/(self|cross)/(query|key|value|out)/') == 56 * (5 * 320 + 5 * 640 + 6 * 1280) + 16 * 8 * 768
  every = sum(4 * (np.prod(k.shape[:-1]) + k.shape[-1]) for k in kernels(shapes).values())
  assert count(4, EVERY) == every < 0.05 * size(shapes)


# What merging means


def separately(net, adapters, scale):
  """The network's function with every adapter as layers of its own: x -> layer(x) + scale up(down(x))."""
  found = lora.modules(adapters)
  def call(next_fun, args, kwargs, context):
    path, module = context.module.path, context.module
    if path not in found or context.method_name != '__call__':
      return next_fun(*args, **kwargs)
    down, up = (found[path][name] for name in ('down', 'up'))
    narrow = module.clone(features=down.shape[-1], parent=None, name=None)
    bias = {'bias': jnp.zeros(down.shape[-1])} if 'bias' in module.variables['params'] else {}
    h = narrow.apply({'params': {'kernel': down, **bias}}, *args, **kwargs)
    return next_fun(*args, **kwargs) + scale * (h @ up)
  def run(params, *args):
    with nn.intercept_methods(call):
      return net.apply({'params': params}, *args)
  return run


@pytest.mark.parametrize(('layer', 'space'), [
    (Conv(4), (6,)), (Conv(4, stride=2), (6,)), (Conv(4), (5, 4)), (Conv(4, stride=2), (5, 4)),
    (Conv(4, size=1), (5, 4)), (Dense(4), (5, 4)), (Conv(4), (3, 4, 5)), (nn.Dense(4, use_bias=False), (3,))])
def test_a_merged_layer_is_the_layer_and_its_adapter(layer, space):
  net, x = nn.Sequential([layer]), normal(2, *space, 3)
  params = filled(jax.eval_shape(net.init, KEY, x)['params'])
  adapters = adapters_of(params, 2)
  run = jit(lambda p, a: (net.apply({'params': lora.merge(p, a, 0.7)}, x), separately(net, a, 0.7)(p, x),
                          net.apply({'params': p}, x)))
  merged, apart, base = run(params, adapters)
  np.testing.assert_allclose(merged, apart, atol=1e-5)
  assert np.abs(merged - base).max() > 0.1


def test_a_merged_network_is_the_network_and_its_adapters():
  params = filled(unet_condition.shapes(READER))
  adapters = adapters_of(params, 2)
  inputs = normal(2, 4, 4, 4), np.array([7.0, 900.0]), {'text': normal(2, 3, 5)}
  merged, apart = jit(lambda p, a: (READER.apply({'params': lora.merge(p, a, 0.5)}, *inputs),
                                    separately(READER, a, 0.5)(p, *inputs)))(params, adapters)
  np.testing.assert_allclose(merged, apart, atol=1e-5 * float(np.abs(apart).max()))


def test_scanned_blocks_are_adapted_one_by_one():
  """DiT with scan has the same blocks as without, along a first axis: of kernels, and so of their adapters."""
  shapes = FAMILIES['scanned dit']()
  params, adapters = filled(shapes), adapters_of(shapes, 2)
  assert adapters['blocks']['query']['down'].shape == (2, 8, 2) and adapters['blocks']['query']['up'].shape == (2, 2, 8)
  merged = merge(params, adapters, 0.3)
  for i in range(2):
    one = lambda tree, i=i: jax.tree.map(lambda a: a[i], tree['blocks'])
    alone = merge(one(params), one(adapters), 0.3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one(merged), alone)


def test_a_scanned_convolution_is_adapted_too():
  kernel = {'blocks': {'a': {'kernel': jnp.asarray(normal(5, 3, 3, 4, 6))}}}
  adapters = adapters_of(kernel, 2)
  down, up = (np.asarray(adapters['blocks']['a'][name], np.float64) for name in ('down', 'up'))
  assert down.shape == (5, 3, 3, 4, 2) and up.shape == (5, 1, 1, 2, 6)
  wanted = kernel['blocks']['a']['kernel'] + np.einsum('dhwir,dro->dhwio', down, up[:, 0, 0])
  np.testing.assert_allclose(lora.merge(kernel, adapters)['blocks']['a']['kernel'], wanted, atol=1e-5)


def test_several_are_mixed_and_alpha_is_over_the_rank():
  shapes = FAMILIES['clip']()
  params = filled(shapes)
  a, b = adapters_of(shapes, 2, seed=3), adapters_of(shapes, 4, 'block_0/query|mlp_in', seed=4)
  mixed = kernels(merge(params, [(a, 0.5), (b, -2.0)], 0.75))
  for path, kernel in kernels(params).items():
    wanted = np.asarray(kernel, np.float64)
    for tree, scale in ((a, 0.375), (b, -1.5)):
      if module := lora.modules(tree).get(path):
        wanted = wanted + scale * np.asarray(module['down'], np.float64) @ np.asarray(module['up'], np.float64)
    np.testing.assert_allclose(mixed[path], wanted, atol=1e-5)
  # peft's alpha 8 of rank 4 is a scale of 2; exact, since all of them are powers of 2.
  alpha = unflatten_dict({(*path, name): leaf for path, module in lora.modules(b).items()
                          for name, leaf in {**module, 'alpha': jnp.float32(8)}.items()})
  assert bits(merge(params, alpha)) == bits(merge(params, b, 2.0))
  of_alpha = jit(jax.grad(lambda t: sum(jnp.sum(k ** 2) for k in kernels(lora.merge(params, t)).values())))(alpha)
  assert all(module['alpha'] == 0 and jnp.any(module['up']) for module in lora.modules(of_alpha).values())


def test_a_network_that_normalises_its_kernels_is_only_turned():
  """An adapter along a kernel changes nothing, where the kernel of another network would grow; what training does to
  the weights of edm2.UNet after each step is none of adapters' business."""
  layer, x = edm2.MPConv(4), normal(2, 3)
  a, b = jnp.asarray(normal(3, 1)), jnp.asarray(normal(1, 4, seed=5))
  params, along = {'kernel': a @ b}, {'down': a, 'up': b}
  base = layer.apply({'params': params}, x)
  np.testing.assert_allclose(layer.apply({'params': lora.merge(params, along, 3.0)}, x), base, atol=1e-6)
  across = layer.apply({'params': lora.merge(params, {'down': a, 'up': jnp.roll(b, 1)}, 3.0)}, x)
  assert np.abs(across - base).max() > 0.1
  adapters = adapters_of(FAMILIES['edm2'](), 2)
  assert bits(edm2.UNet.project(adapters)) == bits(adapters)


# Unmerging


def test_unmerging_forgets_no_bit():
  """Of kernels of all magnitudes, under jit and after two merges; what subtraction leaves is not the same."""
  rng = np.random.default_rng(0)
  kernel = (rng.standard_normal((64, 32)) * 10.0 ** rng.integers(-44, 30, (64, 32))).astype(np.float32)
  kernel[0, :3] = -0.0, np.finfo(np.float32).max, 1e-45
  params = {'a': {'b': {'kernel': jnp.asarray(kernel), 'bias': jnp.ones(32)}}, 'table': jnp.ones(3)}
  adapters, other = (adapters_of(params, 4, seed=seed) for seed in (2, 3))
  for run in (lora.merge, jax.jit(lora.merge, static_argnames='keep')):
    merged = run(params, adapters, 0.3, keep=True)
    assert bits(lora.unmerge(merged)) == bits(params)
    assert bits(jax.jit(lora.unmerge)(run(merged, other, 2.0, keep=True))) == bits(params)
    # One of several is taken away by merging the others again.
    both = run(params, [(adapters, 0.5), (other, 1.0)], keep=True)
    assert bits(run(lora.unmerge(both), other)) == bits(run(params, other)) != bits(params)
    plain = run(params, adapters, 0.3)
    assert plain['a']['b'].keys() == params['a']['b'].keys()
    np.testing.assert_array_equal(plain['a']['b']['kernel'], merged['a']['b']['kernel'])
    assert bits(run(plain, adapters, -0.3)) != bits(params)


def test_networks_do_not_look_at_what_was_kept():
  net, x = CLIPText(vocabulary=9, width=8, depth=1, heads=2, mlp=16, length=4), jnp.array([[1, 2, 8]])
  params = filled(clip.shapes(net))
  merged = merge(params, adapters_of(params, 2), keep=True)
  plain = jax.tree.map(lambda _, a: a, params, {**merged, 'block_0': {
      name: {key: leaf for key, leaf in module.items() if key != lora.BEFORE}
      for name, module in merged['block_0'].items()}})
  run = jit(lambda params: net.apply({'params': params}, x).text)
  np.testing.assert_array_equal(run(merged), run(plain))
  assert merged['block_0']['query'].keys() == {'kernel', 'bias', lora.BEFORE}


# Training


def test_adapters_alone_are_trained():
  """A few steps lower the loss and leave the base as it is; the gradient is the kernels', as the adapter sees it."""
  params = filled(shapes_of(SMALL, (2, 4, 4, 1)))
  before = bits(params)
  x, noise, y = normal(2, 4, 4, 1), np.array([3.0, 500.0], np.float32), normal(2, 4, 4, 1, seed=3)
  start = adapters = jit(lambda: lora.init(KEY, params, 2, '(query|value|conv_1|embed_out)/kernel$'))()
  tx = optax.adam(3e-2)

  def loss_of(adapters, params):
    return jnp.mean((SMALL.apply({'params': lora.merge(params, adapters)}, x, noise, {}) - y) ** 2)

  @jit
  def step(adapters, state):
    loss, grads = jax.value_and_grad(loss_of, argnums=(0, 1))(adapters, params)
    updates, state = tx.update(grads[0], state)
    whole = {path: kernel for path, kernel in kernels(grads[1]).items() if path in lora.modules(adapters)}
    return optax.apply_updates(adapters, updates), state, loss, (grads[0], whole)

  state, losses, steps = jit(tx.init)(adapters), [], []
  for _ in range(20):
    adapters, state, loss, grads = step(adapters, state)
    losses, steps = [*losses, float(loss)], [*steps, grads]
  assert losses[-1] < 0.8 * losses[0]
  assert bits(params) == before
  # With up = 0, its gradient is down^T dW, and that of down is zero.
  of_adapters, of_kernels = steps[0]
  for path, module in lora.modules(of_adapters).items():
    down, whole = np.asarray(lora.modules(start)[path]['down']), np.asarray(of_kernels[path])
    wanted = down.reshape(-1, down.shape[-1]).T @ whole.reshape(-1, whole.shape[-1])
    np.testing.assert_allclose(module['up'], wanted, atol=1e-4 * (1 + np.abs(wanted).max()))
    assert not module['down'].any()


# What is refused


def test_what_cannot_be_adapted_is_named():
  params = filled(FAMILIES['clip']())
  for rank, pattern, words in [
      (0, '.', 'rank must be at least 1, got 0'), (2, '(', r"'\(' is no regular expression: "),
      (2, 'block_0/querry', "'block_0/querry' in its path: the nearest are block_0/query/kernel")]:
    with pytest.raises(ValueError, match=words):
      lora.init(KEY, params, rank, pattern)
  with pytest.raises(ValueError, match='there are no kernels'):
    lora.init(KEY, {'embed_label': jnp.ones((2, 2))}, 1)
  adapters = lora.init(KEY, params, 2, 'block_0/query')
  pair = adapters['block_0']['query']
  for tree, words in [
      ({'block_0': {'querry': pair}}, "no kernel for the adapter 'block_0/querry': the nearest are block_0/query"),
      ({'block_0': {'mlp_in': pair}}, r"'block_0/mlp_in' is for another network: down \[8, 2\] and up \[2, 8\] do not"),
      ({'block_0': {'query': {**pair, 'up': jnp.ones((1, 8))}}}, r'down \[8, 2\] and up \[1, 8\] do not'),
      ({'block_0': {'query': {'down': pair['down']}}}, "at most alpha, and 'block_0/query' has down"),
      (params, 'an adapter has down, up and at most alpha'),
  ]:
    with pytest.raises(ValueError, match=words):
      lora.merge(params, tree)
  with pytest.raises(ValueError, match='nothing can be unmerged'):
    lora.unmerge(lora.merge(params, adapters))
