"""Tokens of bytes and the encoder that is trained with a model."""
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import filled, jit

from diffusion_jax.nets.text import ByteEncoder, tokenise

SMALL = ByteEncoder(width=16, depth=2, heads=2, length=12)


def decoded(row):
  """The text of a row of tokens."""
  return bytes((row[row > 0] - 1).astype(np.uint8)).decode()


@pytest.mark.parametrize('text', ['', 'a cat', 'Käse', '猫', '🐈‍⬛', 'a\0b', ' \n', 'naïve e\u0301'])
def test_tokens_are_bytes_and_go_back(text):
  ids = tokenise([text], 40)
  assert (ids.dtype, ids.shape) == (np.int32, (1, 40))
  assert decoded(ids[0]) == unicodedata.normalize('NFC', text)
  count = len(unicodedata.normalize('NFC', text).encode())
  assert (ids[0, :count] > 0).all() and not ids[0, count:].any()


def test_a_zero_byte_is_no_padding():
  np.testing.assert_array_equal(tokenise(['\0\xff'], 4), [[1, 0xc3 + 1, 0xbf + 1, 0]])


def test_texts_that_look_the_same_are_the_same():
  np.testing.assert_array_equal(*np.split(tokenise(['e\u0301te\u0301', '\u00e9t\u00e9'], 8), 2))


@pytest.mark.parametrize(('length', 'kept'), [(1, 'a'), (2, 'a'), (3, 'a'), (4, 'a猫'), (5, 'a猫b'), (6, 'a猫b')])
def test_a_long_text_ends_after_a_whole_character(length, kept):
  assert decoded(tokenise(['a猫b'], length)[0]) == kept


def test_half_a_surrogate_pair_is_no_text():
  with pytest.raises(ValueError, match=r'prompt .* is no valid text: surrogates not allowed'):
    tokenise(['a\ud83d'], 8)


@pytest.fixture(scope='module')
def encode():
  params = filled(jax.eval_shape(SMALL.init, jax.random.key(0), jnp.zeros((1, 12), int))['params'])
  run = jit(lambda ids: SMALL.apply({'params': params}, ids))
  return lambda texts, length=12: jax.tree.map(np.asarray, run(tokenise(texts, length)))


def test_padding_changes_nothing(encode):
  """A prompt's tokens are the same whatever the length of the row and whatever else is in the batch."""
  text, mask = encode(['a cat', 'twelve bytes'])
  np.testing.assert_array_equal(mask.sum(1), [5, 12])
  short, short_mask = encode(['a cat'], 6)
  assert short.shape == (1, 6, 16) and short_mask.sum() == 5
  np.testing.assert_allclose(short[0, :5], text[0, :5], atol=1e-5)


def test_every_byte_and_its_place_count(encode):
  text, _ = encode(['ab', 'ba', 'ac', 'a'])
  for other in text[1:]:
    assert np.abs(other[0] - text[0, 0]).max() > 1e-3  # the first byte's output knows the rest


def test_an_empty_prompt_is_finite_and_masked(encode):
  text, mask = encode([''])
  assert np.isfinite(text).all() and not mask.any()


def test_more_tokens_than_places_is_an_error():
  with pytest.raises(ValueError, match='the text encoder has 12 places, got 13 tokens'):
    jax.eval_shape(SMALL.init, jax.random.key(0), jnp.zeros((1, 13), int))
