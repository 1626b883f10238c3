"""CLIP's text encoder against transformers, and its names."""
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import filled, jit
from safetensors.numpy import load_file

from diffusion_jax.convert import clip as convert
from diffusion_jax.nets.clip import CLIPText

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
# OpenAI's model as Stable Diffusion 1 names its end, and OpenCLIP's structure with its own end and a projection.
CASES = ['clip_text_eos_legacy2', 'clip_text_projection']


@pytest.fixture(scope='module', params=CASES)
def case(request):
  """(net, their tensors, inputs and outputs) of one fixture."""
  path = FIXTURES / request.param
  config = json.loads(path.with_suffix('.json').read_text())['config']
  return convert.net(config), load_file(path.with_suffix('.safetensors')), np.load(path.with_suffix('.npz'))


def test_equals_transformers(case):
  net, tensors, saved = case
  params = convert.from_theirs(net, tensors)
  run = jit(lambda ids, skip: net.apply({'params': params}, ids, skip), static_argnums=1)
  out = run(saved['in/ids'], 0)
  np.testing.assert_allclose(out.text, saved['out64/last_hidden_state'], atol=1e-4)
  np.testing.assert_allclose(out.pooled, saved['out64/pooled'], atol=1e-4)
  np.testing.assert_allclose(out.states[-2], saved['out64/penultimate_h'], atol=1e-4)
  if net.projection:
    np.testing.assert_allclose(out.projected, saved['out64/projected'], atol=1e-4)
  else:
    assert out.projected is None
  # A layer that is skipped is normalised as the last one would be, and what is pooled stays.
  skipped = run(saved['in/ids'], 1)
  h = saved['out64/penultimate_h'].astype(np.float64)
  h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + net.epsilon)
  np.testing.assert_allclose(skipped.text, h * params['norm']['scale'] + params['norm']['bias'], atol=1e-4)
  np.testing.assert_array_equal(skipped.pooled, out.pooled)


def test_names_go_there_and_back_bit_for_bit(case):
  net, tensors, _ = case
  prefix = convert.PREFIX if any(key.startswith(convert.PREFIX) for key in tensors) else ''
  params = convert.from_theirs(net, tensors)
  back = convert.to_theirs(net, params, prefix=prefix)
  assert set(back) == set(tensors)
  for key, tensor in tensors.items():
    assert back[key].dtype == tensor.dtype
    np.testing.assert_array_equal(back[key], tensor)
  again = convert.from_theirs(net, convert.to_theirs(net, params))
  jax.tree.map(np.testing.assert_array_equal, again, params)
  assert convert.net(json.loads(json.dumps(convert.config(net)))) == net


def test_old_files_hold_a_table_of_places_too(case):
  net, tensors, _ = case
  old = {**tensors, 'text_model.embeddings.position_ids': np.arange(77)[None]}
  jax.tree.map(np.testing.assert_array_equal, convert.from_theirs(net, old), convert.from_theirs(net, tensors))


def test_no_token_sees_a_later_one():
  net = CLIPText(vocabulary=20, width=8, depth=2, heads=2, mlp=16, length=6, end=9)
  params = filled(convert.shapes(net))
  run = jit(lambda ids: net.apply({'params': params}, ids))
  ids = np.array([[1, 2, 9, 4, 9, 6]])
  base = run(ids)
  np.testing.assert_array_equal(base.pooled, base.text[:, 2])  # at the first end
  for place in range(6):
    changed = ids.copy()
    changed[0, place] = 7
    moved = np.abs(np.asarray(run(changed).text - base.text)).max(-1)[0] > 1e-4
    np.testing.assert_array_equal(moved, np.arange(6) >= place)


def test_the_defaults_are_those_of_stable_diffusion():
  """123,060,480 parameters: 12 layers of width 768, 49,408 tokens, 77 places."""
  dense = lambda fan_in, fan_out: (fan_in + 1) * fan_out
  layer = 4 * dense(768, 768) + dense(768, 3072) + dense(3072, 768) + 4 * 768
  expected = 12 * layer + (49_408 + 77) * 768 + 2 * 768
  assert sum(leaf.size for leaf in jax.tree.leaves(convert.shapes(CLIPText()))) == expected == 123_060_480


@pytest.mark.parametrize(('make', 'words'), [
    (lambda: CLIPText(activation='relu'), "activation must be one of quick_gelu, gelu, got 'relu'"),
    (lambda: CLIPText(heads=5), 'heads must divide width: width 768, heads 5'),
    (lambda: jax.eval_shape(CLIPText(depth=1).init, jax.random.key(0), jnp.zeros((1, 78), int)),
     'CLIP has 77 places for tokens, got 78'),
    (lambda: jax.eval_shape(lambda key: CLIPText(depth=1).init(key, jnp.zeros((1, 7), int), 1), jax.random.key(0)),
     r'skip must lie in 0 .. 0, got 1'),
])
def test_bad_arguments_are_named_with_both_values(make, words):
  with pytest.raises(ValueError, match=words):
    make()
