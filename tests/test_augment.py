"""EDM's augmentation: what each label does to an image, how often, and that the image alone decides nothing else."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import jit

from diffusion_jax.data import augment

augmented = jit(augment.augment, static_argnums=2)
transform = jit(augment.transform)
X_FLIP, Y_FLIP, SIZE, COS, SIN, ALONG, ACROSS, RIGHT, DOWN = range(9)


def pictures(*shape, seed=0):
  return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def labels(count=1, **values):
  """Labels [count, 9], zero but for those that are named."""
  rows = np.zeros((count, 9), np.float32)
  for name, value in values.items():
    rows[:, globals()[name]] = value
  return rows


def plane(matrix):
  """A 2 x 2 matrix or a shift of the plane as a 3 x 3 matrix."""
  whole = np.eye(3)
  whole[:2, :2] = matrix
  return whole


def table(row, height, width):
  """Table 6 of the paper, flips aside: the 3 x 3 matrix that moves the pixels of an image about its centre."""
  turn = lambda angle: plane([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
  a3, a4 = np.arctan2(row[SIN], row[COS] + 1), np.arctan2(row[ACROSS], row[ALONG])
  scale, aniso = (2 ** 0.2) ** row[SIZE], (2 ** 0.2) ** np.hypot(row[ALONG], row[ACROSS])
  move = np.eye(3)
  move[:2, 2] = row[RIGHT] * width / 8, row[DOWN] * height / 8
  return move @ turn(a4) @ plane(np.diag([aniso, 1 / aniso])) @ turn(-a4) @ turn(-a3) @ plane(scale * np.eye(2))


def waves(shape, seed):
  """A smooth image as a function of the place: cosines that are their own mirror images at the borders."""
  height, width, channels = shape
  coefficients = np.random.default_rng(seed).standard_normal((3, 3, channels)) / 4
  def image(x, y):
    rows, columns = (np.cos(np.pi * np.arange(3) * v[..., None] / (n - 1)) for v, n in ((y, height), (x, width)))
    return np.einsum('...i,...j,ijc->...c', rows, columns, coefficients)
  return image


def grid(height, width):
  return np.meshgrid(np.arange(width, dtype=float), np.arange(height, dtype=float))


def test_the_filters_undo_each_other_and_pass_cubics():
  """The equations that define the pair: perfect reconstruction, and four vanishing moments of each at the top."""
  taps = {name: np.array([*values[:0:-1], *values]) for name, values in
          (('halve', augment.HALVE), ('double', augment.DOUBLE))}
  every = np.convolve(taps['halve'], taps['double'])
  centre = len(every) // 2
  np.testing.assert_allclose(every[centre % 2::2], np.eye(len(every))[centre][centre % 2::2], atol=1e-12)
  for name, total in (('halve', 1), ('double', 2)):
    k = np.arange(len(taps[name])) - len(taps[name]) // 2
    np.testing.assert_allclose(taps[name].sum(), total, atol=1e-12)
    for power in range(4):
      assert abs(np.sum((-1.0) ** k * k ** power * taps[name])) < 1e-9


def test_probability_0_returns_the_bits():
  x = pictures(4, 8, 8, 3)
  out, found = augmented(jax.random.key(1), x, 0.0)
  np.testing.assert_array_equal(out, x)
  np.testing.assert_array_equal(found, np.zeros((4, 9)))


def test_what_is_not_chosen_stays_as_it_was_and_every_label_changes_something():
  x = jnp.asarray(pictures(256, 8, 8, 1))
  out, found = augmented(jax.random.key(0), x, 0.12)
  changed, labelled = (np.asarray(out != x).any((1, 2, 3)), np.asarray(found).any(1))
  np.testing.assert_array_equal(changed, labelled)
  assert 0 < labelled.sum() < 256
  flipped = labelled & ~np.asarray(found[:, 1:]).any(1)
  assert flipped.sum() > 20
  np.testing.assert_array_equal(out[flipped], x[flipped, :, ::-1])


@pytest.mark.parametrize(('chosen', 'expected'), [
    ({'X_FLIP': 1}, lambda x: x[:, :, ::-1]), ({'Y_FLIP': 1}, lambda x: x[:, ::-1]),
    ({'X_FLIP': 1, 'Y_FLIP': 1}, lambda x: x[:, ::-1, ::-1])])
def test_flips_permute_the_pixels_and_undo_themselves(chosen, expected):
  x = pictures(1, 6, 8, 3)
  out = transform(x, labels(**chosen))
  np.testing.assert_array_equal(out, expected(x))
  np.testing.assert_array_equal(transform(out, labels(**chosen)), x)


@pytest.mark.parametrize('move', [(1, 0), (0, -2), (3, 5), (-11, 4)])
def test_moves_by_whole_pixels_are_exact(move):
  right, down = move
  x = pictures(1, 8, 12, 3)
  beyond = np.pad(x, [(0, 0), (14, 14), (14, 14), (0, 0)], 'reflect')
  out = transform(x, labels(RIGHT=8 * right / 12, DOWN=down))
  np.testing.assert_allclose(out, beyond[:, 14 - down:22 - down, 14 - right:26 - right], atol=1e-5)


@pytest.mark.parametrize('turns', [1, 2, 3])
def test_quarter_turns_are_exact(turns):
  x = pictures(1, 9, 9, 2)
  out = transform(x, labels(COS=np.cos(turns * np.pi / 2) - 1, SIN=np.sin(turns * np.pi / 2)))
  np.testing.assert_allclose(out, np.rot90(x, turns, (1, 2)), atol=2e-5)


@pytest.mark.parametrize('shape', [(8, 8, 1), (32, 24, 3), (64, 64, 3)])
def test_smooth_images_are_moved_as_the_table_says(shape):
  rng, (height, width, _), count = np.random.default_rng(3), shape, 24
  turn, along, stretch = *rng.uniform(-np.pi, np.pi, (2, count)), rng.standard_normal(count)
  rows = labels(count, SIZE=rng.standard_normal(count), COS=np.cos(turn) - 1, SIN=np.sin(turn),
                ALONG=stretch * np.cos(along), ACROSS=stretch * np.sin(along), RIGHT=rng.standard_normal(count),
                DOWN=rng.standard_normal(count))
  for i in range(8):  # each alone, then all together
    rows[i] *= np.isin(range(9), [[2], [3, 4], [5, 6], [7, 8]][i % 4])
  image, centre = waves(shape, 5), np.array([width - 1, height - 1]) / 2
  out = transform(np.repeat(image(*grid(height, width))[None].astype(np.float32), count, 0), rows)
  places = np.stack([*grid(height, width), np.ones((height, width))], -1)
  places[..., :2] -= centre
  for row, moved in zip(rows, np.asarray(out), strict=True):
    x, y = np.moveaxis((places @ np.linalg.inv(table(row.astype(float), height, width)).T)[..., :2] + centre, -1, 0)
    # Of second order in the fastest frequency: linear interpolation between points half a pixel apart along each axis
    # (1 / 32 of its square), and the filters, whose product alone is flat (0.06 times what the change of scale leaves).
    np.testing.assert_allclose(moved, image(x, y), atol=0.12 * (2 * np.pi / (min(height, width) - 1)) ** 2)


def test_what_is_too_fine_for_a_smaller_image_is_filtered_out():
  fine = np.cos(0.8 * np.pi * np.arange(64)) * np.ones((64, 1))
  coarse = np.cos(0.2 * np.pi * np.arange(64)) * np.ones((64, 1))
  half = labels(SIZE=-5)  # 2^(0.2 * -5)
  inner = lambda x: np.asarray(transform(x[None, ..., None].astype(np.float32), half))[0, 20:44, 20:44, 0]
  assert abs(inner(fine)).max() < 0.1 and abs(inner(coarse)).max() > 0.9


def test_a_constant_image_stays_as_it_is():
  out, found = augmented(jax.random.key(5), np.full((256, 8, 8, 1), 0.7, np.float32), 0.12)
  assert (np.asarray(found)[:, 2:] != 0).any(1).sum() > 50
  np.testing.assert_allclose(out, 0.7, atol=1e-5)


def test_an_image_depends_on_its_number_and_not_on_its_batch():
  x, key = pictures(5, 8, 8, 3), jax.random.key(2)
  out, found = augmented(key, x, 0.7)
  fewer, rows = augmented(key, x[:3], 0.7)
  np.testing.assert_array_equal(rows, found[:3])
  np.testing.assert_allclose(fewer, out[:3], atol=1e-6)
  assert len(np.unique(np.asarray(found), axis=0)) == 5
  assert (np.asarray(augmented(jax.random.key(3), x, 0.7)[1]) != found).any()


def test_augmentations_are_drawn_as_often_and_as_far_as_the_table_says():
  count, share = 20000, 0.12
  keys = jax.random.split(jax.random.key(7), count)
  found = np.asarray(jit(jax.vmap(lambda key: augment.draw(key, share)))(keys))
  close = lambda value, expected, spread, n: abs(value - expected) < 5 * spread / np.sqrt(n)
  for column, expected in [(X_FLIP, 0.5), (Y_FLIP, share / 2), *[(k, share) for k in range(2, 9)]]:
    assert close((found[:, column] != 0).mean(), expected, np.sqrt(expected * (1 - expected)), count), column
  np.testing.assert_array_equal(*[found[:, [COS, ALONG, RIGHT]] != 0, found[:, [SIN, ACROSS, DOWN]] != 0])
  independent = (found[:, [SIZE, SIN, ALONG, RIGHT]] != 0).T
  for i, a in enumerate(independent):
    for b in independent[:i]:
      assert close((a & b).mean(), share ** 2, share, count)
  normal = found[found[:, SIZE] != 0, SIZE]
  assert close(normal.mean(), 0, 1, len(normal)) and close(normal.var(), 1, 2 ** 0.5, len(normal))
  turned = found[found[:, SIN] != 0][:, [COS, SIN]] + [1, 0]
  np.testing.assert_allclose(np.hypot(*turned.T), 1, atol=1e-6)
  stretched = found[found[:, ALONG] != 0][:, [ALONG, ACROSS]]
  moved = found[found[:, RIGHT] != 0][:, [RIGHT, DOWN]]
  for pairs, variance, spread in [(turned, 1 / 2, 8 ** -0.5), (stretched, 1 / 2, 1.25 ** 0.5), (moved, 1, 2 ** 0.5)]:
    for values in pairs.T:
      assert close(values.mean(), 0, variance ** 0.5, len(values))
      assert close((values ** 2).mean(), variance, spread, len(values))
    assert close(pairs.prod(1).mean(), 0, 1, len(pairs))
  radius = np.hypot(*stretched.T) ** 2  # of a5 alone, not of two normals
  assert close(radius.mean(), 1, 2 ** 0.5, len(radius)) and close((radius ** 2).mean(), 3, 96 ** 0.5, len(radius))


def test_bfloat16_stays_bfloat16():
  x = jnp.asarray(pictures(2, 8, 8, 1), jnp.bfloat16)
  out = transform(x, labels(2, SIZE=0.3))
  assert out.dtype == jnp.bfloat16 and out.shape == x.shape


@pytest.mark.parametrize(('shape', 'probability', 'words'), [
    ((2, 8, 3), 0.1, r'two spatial axes .*got \(2, 8, 3\)'), ((2, 8, 8, 1), 1.5, 'from 0 to 1, got 1.5'),
    ((2, 8, 8, 1), -0.1, 'from 0 to 1, got -0.1')])
def test_bad_input_is_explained(shape, probability, words):
  with pytest.raises(ValueError, match=words):
    augment.augment(jax.random.key(0), pictures(*shape), probability)
