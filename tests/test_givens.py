"""What is given of an image: closed forms of what is seen, and which of it is hidden."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import SPACES, jit, normal

from diffusion_jax.core import givens
from diffusion_jax.runtime.config import build, spec

KEY = jax.random.key(4)
GIVENS = {'none': givens.none(), 'low_resolution': givens.low_resolution(2),
          'low_resolution with noise': givens.low_resolution(2, 0.5), 'masked': givens.masked(), 'grey': givens.grey(),
          'edges': givens.edges()}
run = jit(lambda given, key, x0: given(key, x0), static_argnums=0)


@pytest.mark.parametrize('name', GIVENS)
def test_no_image_depends_on_its_batch(name):
  given, x0 = GIVENS[name], normal(3, 4, 6, 3)
  out = run(given, KEY, x0)
  np.testing.assert_allclose(run(given, KEY, x0[:2]), out[:2], atol=1e-6)
  random = name in ('masked', 'low_resolution with noise')
  assert (np.asarray(run(given, jax.random.key(5), x0)) != out).any() == random


@pytest.mark.parametrize('name', GIVENS)
def test_as_many_channels_as_it_says_on_any_number_of_axes(name):
  for space in [(8,), (4, 6), (2, 4, 6)]:
    x0 = jax.ShapeDtypeStruct((3, *space, 3), jnp.float32)
    out = jax.eval_shape(GIVENS[name], KEY, x0)
    assert (out.shape, out.dtype) == ((3, *space, GIVENS[name].channels(3)), x0.dtype)


def test_a_config_can_name_them():
  assert givens.__all__ == sorted({name.split()[0] for name in GIVENS})
  assert build(spec(givens.masked, least=0.2)).channels(3) == 4
  assert build(spec(givens.none)).channels(3) == 0
  assert build(spec(givens.low_resolution, noise=0.1)).channels(3) == 4


@pytest.mark.parametrize(('space', 'factor'), [((12,), 3), ((8, 12), 4), ((4, 6, 8), 2)])
def test_low_resolution_keeps_ramps_inside_and_constants_everywhere(space, factor):
  given = givens.low_resolution(factor)
  np.testing.assert_allclose(given(KEY, jnp.full((1, *space, 2), 0.3)), 0.3, atol=1e-6)
  slopes = np.arange(1, len(space) + 1)
  ramp = np.tensordot(slopes, np.indices(space), 1)[None, ..., None].astype(np.float32)
  inside = (slice(None), *[slice(factor // 2, n - factor // 2) for n in space])
  out = given(KEY, ramp)
  np.testing.assert_allclose(out[inside], ramp[inside], atol=1e-5)
  # At the border the ramp goes on as the value of the outermost box, which lies (factor - 1) / 2 inside.
  np.testing.assert_allclose(out.ravel()[0], slopes.sum() * (factor - 1) / 2, atol=1e-5)


def test_low_resolution_hides_what_its_boxes_do_not_show():
  given, x0 = givens.low_resolution(4), normal(2, 8, 8, 3)
  boxes = x0.reshape(2, 2, 4, 2, 4, 3)
  other = (boxes - boxes.mean((2, 4), keepdims=True))[..., ::-1, :] + boxes.mean((2, 4), keepdims=True)
  np.testing.assert_allclose(given(KEY, other.reshape(x0.shape)), given(KEY, x0), atol=1e-6)
  np.testing.assert_allclose(given.of(boxes.mean((2, 4))), given(KEY, x0), atol=1e-6)  # what a user gives


def test_noise_on_the_small_image_is_as_strong_as_its_channel_says():
  given, zeros = givens.low_resolution(2, noise=0.8), np.zeros((400, 2, 16, 1), np.float32)
  out = np.asarray(run(given, KEY, zeros))
  std = out[:, 0, 0, 1]
  np.testing.assert_array_equal(out[..., 1], np.broadcast_to(std[:, None, None], (400, 2, 16)))
  assert 0 <= std.min() < 0.05 and 0.75 < std.max() <= 0.8 and abs(std.mean() - 0.4) < 5 * 0.8 / np.sqrt(12 * 400)
  low = out[:, 0, [0, -1], 0]  # at its border a small image is seen itself: of one row, its first and last elements
  z = low / std[:, None]
  assert abs(z.mean()) < 5 / np.sqrt(800) and abs(z.var() - 1) < 5 * np.sqrt(2 / 800)
  sampled = jit(lambda low: given.of(low, 0.5, KEY))(zeros[:, :1, :8])
  np.testing.assert_array_equal(sampled[..., 1], 0.5)
  z = np.asarray(sampled)[:, 0, [0, -1], 0] / 0.5
  assert abs(z.var() - 1) < 5 * np.sqrt(2 / 800)
  np.testing.assert_array_equal(given.of(zeros[:, :1, :8]), zeros[:, :2, :16].repeat(2, -1))


@pytest.mark.parametrize('space', SPACES)
def test_a_mask_hides_one_box_and_nothing_else(space):
  x0 = 1 + normal(50, *space, 2) ** 2  # nowhere zero
  out = np.asarray(run(givens.masked(0.1, 0.6), KEY, x0))
  known, image = out[..., 0] == 1, out[..., 1:]
  np.testing.assert_array_equal(image, np.where(known[..., None], x0, 0))
  np.testing.assert_array_equal(out[..., 0], known)
  for hidden in ~known:
    sides = [np.flatnonzero(hidden.any(tuple(k for k in range(len(space)) if k != axis))) for axis in range(len(space))]
    box = np.zeros(space, bool)
    box[np.ix_(*sides)] = True
    np.testing.assert_array_equal(hidden, box)
    assert all(len(side) == 0 or len(side) == side[-1] - side[0] + 1 for side in sides)


def test_hidden_shares_are_uniform_and_their_places_cover_the_image():
  out = run(givens.masked(0.2, 0.6), KEY, np.ones((400, 64, 64, 1), np.float32))
  hidden = 1 - np.asarray(out[..., 0])
  shares = hidden.mean((1, 2))
  rounding = 1 / 64  # at most half a pixel on each of two sides, which are at most 1
  assert 0.2 - rounding <= shares.min() < 0.22 and 0.58 < shares.max() <= 0.6 + rounding
  assert abs(shares.mean() - 0.4) < 5 * 0.4 / np.sqrt(12 * 400)
  np.testing.assert_allclose(hidden.mean(0), hidden.mean(0)[::-1, ::-1], atol=0.15)
  assert hidden.any((0, 1)).all() and hidden.any((0, 2)).all()  # up to the borders
  wide = hidden.any(1).mean(1)
  weight = np.log(wide) / np.log(shares)  # of one side in the share; uniform on [0, 1] if all shapes are as likely
  assert abs(weight.mean() - 1 / 2) < 5 / np.sqrt(12 * 400) and abs(weight.std() - 12 ** -0.5) < 0.03


def test_a_box_is_anywhere_as_likely():
  hidden = 1 - np.asarray(run(givens.masked(0.25, 0.25), KEY, np.ones((400, 4, 1), np.float32))[..., 0])
  np.testing.assert_allclose(hidden.mean(0), 1 / 4, atol=5 * np.sqrt(3 / 16 / 400))


@pytest.mark.parametrize('share', [0.0, 1.0])
def test_nothing_or_all_may_be_hidden(share):
  out = run(givens.masked(share, share), KEY, np.ones((3, 5, 4, 1), np.float32))
  np.testing.assert_array_equal(out, np.full((3, 5, 4, 2), 1 - share))


def test_a_users_picture_and_mask_are_given_as_in_training():
  given, x0 = givens.masked(), normal(4, 6, 5, 3)
  out = run(given, KEY, x0)
  for mask in (out[..., 0], out[..., :1], out[..., 0] > 0):
    np.testing.assert_array_equal(given.of(x0, mask), out)


def test_grey_is_the_luma_of_the_standard():
  colours = jnp.array([[[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]], jnp.float32)
  expected = 2 * np.array([1, 0.299, 0.587, 0.114]) - 1
  np.testing.assert_allclose(GIVENS['grey'](KEY, colours)[0, :, 0], expected, atol=1e-6)
  picture = normal(2, 4, 4, 1)
  np.testing.assert_array_equal(GIVENS['grey'].of(picture), picture)


def test_edges_are_slopes_of_the_luma():
  """Of a ramp everywhere its slope, of a step 1 on both sides of it, and the same wherever up and left are."""
  edges = lambda x: (run(GIVENS['edges'], KEY, x) + 1) / 2
  for space in [(9,), (6, 9), (5, 6, 9)]:
    slopes = 0.1 * np.arange(1, len(space) + 1)
    ramp = np.tensordot(slopes, np.indices(space), 1)[None, ..., None].astype(np.float32)
    inside = (slice(None), *[slice(1, -1)] * len(space))
    np.testing.assert_allclose(edges(ramp)[inside], np.linalg.norm(slopes), atol=1e-6)
    at = np.broadcast_to(np.arange(9)[:, None], ramp.shape)
    np.testing.assert_allclose(edges(np.where(at < 4, -1, 1).astype(np.float32)), (at == 3) | (at == 4), atol=1e-6)
  point = np.zeros((1, 5, 5, 1), np.float32)
  point[0, 2, 2] = 1
  sobel = np.array([[1, 2, 1], [0, 0, 0], [-1, -2, -1]]) / 8
  np.testing.assert_allclose(edges(point)[0, 1:4, 1:4, 0], np.hypot(sobel, sobel.T), atol=1e-6)
  x = normal(2, 5, 5, 3)
  out = np.asarray(edges(x))
  np.testing.assert_allclose(edges(x[:, ::-1]), out[:, ::-1], atol=1e-6)
  np.testing.assert_allclose(edges(x.swapaxes(1, 2)), out.swapaxes(1, 2), atol=1e-6)
  np.testing.assert_allclose(edges(np.broadcast_to(run(GIVENS['grey'], KEY, x), x.shape)), out, atol=1e-6)
  assert edges(9 * x).max() == 1 and out.min() > 0


@pytest.mark.parametrize(('call', 'words'), [
    (lambda: givens.low_resolution(1), 'factor must be at least 2, got 1'),
    (lambda: givens.low_resolution(2, -0.1), 'noise must be at least 0, got -0.1'),
    (lambda: givens.low_resolution(3)(KEY, jnp.zeros((1, 9, 8, 1))), r'\(9, 8\) have no whole boxes of 3'),
    (lambda: givens.low_resolution(2).of(jnp.zeros((1, 4, 4, 1)), 0.2), r'from 0 to 0\.0, .*got 0\.2'),
    (lambda: givens.masked(0.5, 0.2), 'least 0.5 and most 0.2'), (lambda: givens.masked(0, 1.2), 'most 1.2'),
    (lambda: givens.masked().of(jnp.zeros((1, 4, 4, 1)), jnp.zeros((1, 4, 5))), r'\(1, 4, 4\), got \(1, 4, 5\)'),
    (lambda: givens.grey()(KEY, jnp.zeros((1, 4, 4, 2))), 'got 2')])
def test_bad_input_is_explained(call, words):
  with pytest.raises(ValueError, match=words):
    call()
