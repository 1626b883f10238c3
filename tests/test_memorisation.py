"""Laws of the memorisation audit: exact neighbours, the null distributions, what must be flagged and what must not."""
import itertools

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from diffusion_jax import audit
from diffusion_jax.data import sources
from diffusion_jax.metrics import memorisation
from diffusion_jax.runtime.config import UserError


def normal(rng, n):
  return rng.normal(size=(n, 6))


def clusters(rng, n):
  """Three clusters that are wide in 2, 6 and 10 of 20 directions: samples differ in density and dimension."""
  kind = rng.integers(0, 3, n)
  width = np.where(np.arange(20) < 2 + 4 * kind[:, None], 1.0, 0.05)
  return 9 * np.eye(3, 20)[kind] + width * rng.normal(size=(n, 20))


def hubs(rng, n):
  """In many dimensions few images are the nearest of many samples."""
  return rng.normal(size=(n, 60)) * np.exp(0.5 * rng.normal(size=(n, 1)))


def look(generated, train, held_out, **options):
  return memorisation.audit({'x': generated}, {'x': train}, {'x': held_out}, **options).spaces['x']


@pytest.mark.parametrize('dtype', [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize('itself', [False, True])
def test_nearest_is_every_distance_sorted_in_any_chunks(dtype, itself):
  rng = np.random.default_rng(0)
  a, b = ((100 * rng.random(size)).astype(dtype) for size in ((37, 5), (50, 5)))
  if itself:
    a = b
  table = np.linalg.norm(a[:, None].astype(float) - b.astype(float), axis=-1)
  if itself:
    np.fill_diagonal(table, np.inf)
  for chunk in (7, 50, 64):
    distances, indices = memorisation.nearest(a, b, 3, own=np.arange(50) if itself else None, chunk=chunk)
    np.testing.assert_allclose(distances, np.sort(table, 1)[:, :3], rtol=1e-12)
    np.testing.assert_array_equal(indices, np.argsort(table, axis=1, kind='stable')[:, :3])


def test_copies_are_at_distance_zero_however_far_from_the_origin():
  rng = np.random.default_rng(0)
  x = (1e5 + rng.normal(size=(300, 40))).astype(np.float32)
  distances, indices = memorisation.nearest(x[::-1], x, chunk=64)
  assert not distances.any()
  np.testing.assert_array_equal(indices[:, 0], np.arange(300)[::-1])
  duplicate = np.concatenate([x, x])
  assert not memorisation.nearest(duplicate, duplicate, own=np.arange(600), chunk=64)[0].any()
  np.testing.assert_array_equal(memorisation.nearest(x, duplicate, chunk=64)[1][:, 0], np.arange(300))  # the first


def test_near_copies_of_fresh_images_are_beta_binomial():
  """The tail is scipy's, and the number of N draws below the j-th lowest of m has that distribution."""
  tail = memorisation._beta_binomial_tail
  for k, trials, a, b in [(0, 5, 1, 3), (3, 50, 2, 30), (50, 50, 5, 496), (20, 2000, 10, 990)]:
    assert tail(k, trials, a, b) == pytest.approx(scipy.stats.betabinom.sf(k - 1, trials, a, b), rel=1e-9)
  rng = np.random.default_rng(0)
  below = [np.sum(rng.random(50) < np.sort(rng.random(99))[1]) for _ in range(4000)]
  expected = tail(3, 50, 2, 98)
  assert abs(np.mean(np.asarray(below) >= 3) - expected) < 4 * np.sqrt(expected / 4000)


def test_names_drawn_at_random_give_the_z_score():
  """All ways to call 4 of 7 images training ones: the share's mean is 4/7 and its z scores have variance 1."""
  rng = np.random.default_rng(0)
  images, queries = rng.normal(size=(7, 2)), rng.normal(size=(30, 2))
  scores, shares = [], []
  for train in itertools.combinations(range(7), 4):
    held_out = np.setdiff1d(np.arange(7), train)
    sides = [[a[:, 0] for a in memorisation.nearest(queries, images[list(side)])] for side in (train, held_out)]
    share, effective, z = memorisation._owned(*sides, 4, 3)
    shares.append(share)
    scores.append(z)
  assert np.mean(shares) == pytest.approx(4 / 7, rel=1e-12)
  assert np.mean(scores) == pytest.approx(0, abs=1e-12)
  assert np.var(scores) == pytest.approx(1, rel=1e-12)
  owners = np.bincount(memorisation.nearest(queries, images)[1][:, 0])
  assert effective == pytest.approx(30 ** 2 / np.sum(owners ** 2), rel=1e-12)


@pytest.mark.parametrize('draw', [normal, clusters, hubs])
@pytest.mark.parametrize('sizes', [(60, 150, 120), (150, 60, 120), (120, 120, 250)])
def test_fresh_images_raise_no_alarm(draw, sizes):
  """As often as is said or less, with at most 4 standard errors of chance; and the shares are what chance gives."""
  rng, audits = np.random.default_rng(0), 80
  n, m, samples = sizes
  found = [look(draw(rng, samples), draw(rng, n), draw(rng, m)) for _ in range(audits)]
  most = lambda rate: rate + 4 * np.sqrt(rate / audits)
  assert np.mean([s.flagged for s in found]) <= most(0.01)
  for p in ('memorised_p', 'closer_p'):
    assert np.mean([getattr(s, p) < 0.05 for s in found]) <= most(0.05)
  assert np.mean([s.split_p < audit.SPLIT for s in found]) <= most(0.01)
  for values, truth in (([s.memorised_share.value for s in found], found[0].chance),
                        ([s.closer_to_train_share.value for s in found], 0.5)):
    assert abs(np.mean(values) - truth) < 4 * np.std(values) / np.sqrt(audits)
  held = np.mean([s.closer_to_train_share.ci[0] <= 0.5 <= s.closer_to_train_share.ci[1] for s in found])
  assert held > 0.95 - 4 * np.sqrt(0.95 * 0.05 / audits)


@pytest.mark.parametrize('draw', [normal, clusters, hubs])
@pytest.mark.parametrize('part', [0.05, 0.1, 1])
@pytest.mark.parametrize('noise', [0, 0.01])
def test_copies_are_flagged(draw, part, noise):
  """Whatever the numbers of images: no copy is missed because its original is not compared."""
  rng = np.random.default_rng(1)
  for n, m in ((500, 500), (1000, 200), (100, 800)):
    train, copied = draw(rng, n), round(500 * part)
    copies = train[rng.integers(0, n, copied)] + noise * rng.normal(size=(copied, train.shape[1]))
    found = look(np.concatenate([draw(rng, 500 - copied), copies]), train, draw(rng, m))
    assert found.copies and found.memorised_p < memorisation.LEVEL / 2
    assert found.memorised_share.ci[0] <= part + found.chance * (1 - part) <= found.memorised_share.ci[1] + 0.02
    assert set(found.closest[:copied // 2]) <= set(range(500 - copied, 500))
    if part == 1:
      assert found.memorised_share.value > 0.99
      assert n != m or found.closer_to_train_share.ci[0] > 0.95


def test_samples_near_to_everything_are_no_copies():
  """Means of many images, a dull model's samples, are nearer to training images than any image, and no nearer."""
  rng = np.random.default_rng(0)
  train, held_out, others = normal(rng, 300), normal(rng, 300), normal(rng, 4000)
  dull = others.reshape(400, 10, 6).mean(1)
  found = look(dull, train, held_out)
  fresh = look(others[:400], train, held_out)
  assert np.median(found.to_train) < np.median(fresh.to_train)
  assert not found.flagged


def test_a_model_of_few_simple_images_is_told_from_a_copier():
  """One image in five has 2 dimensions instead of 20, and so more unequal distances; the model knows no others.

  Against real images alone it would be taken for a copier; its copies of held-out images say that it is none.
  """
  rng = np.random.default_rng(0)
  flat = lambda n: 9 + rng.normal(size=(n, 20)) * (np.arange(20) < 2)
  draw = lambda n: np.where(rng.random((n, 1)) < 0.2, flat(n), rng.normal(size=(n, 20)))
  found = [look(flat(400), draw(2000), draw(2000)) for _ in range(20)]
  assert np.mean([s.memorised_p < memorisation.LEVEL / 2 for s in found]) > 0.5
  assert np.mean([s.memorised_share.value / s.chance for s in found]) > 3
  assert np.mean([s.mirrored for s in found]) > 3
  assert np.mean([s.flagged for s in found]) <= 0.1
  train = draw(2000)
  copier = np.concatenate([flat(200), train[train[:, 0] > 4][:200]])
  assert look(copier, train, draw(2000)).flagged


def test_a_closer_model_without_copies_is_flagged_by_its_share():
  """Samples halfway between fresh ones and their nearest training image: no ratio is unheard of, but all are low."""
  rng = np.random.default_rng(0)
  train, held_out, x = (rng.normal(size=(n, 60)) for n in (400, 400, 500))
  pulled = x + 0.2 * (train[memorisation.nearest(x, train)[1][:, 0]] - x)
  found = look(pulled, train, held_out)
  assert found.closer and found.closer_to_train_share.ci[0] > 0.6


def test_swapping_the_sets_inverts_the_ratios_and_orders_do_not_matter():
  rng = np.random.default_rng(0)
  x, train, held_out = hubs(rng, 150), hubs(rng, 100), hubs(rng, 100)
  found, swapped = look(x, train, held_out), look(x, held_out, train)
  np.testing.assert_allclose(swapped.ratio, 1 / found.ratio, rtol=1e-12)
  np.testing.assert_array_equal(swapped.train_index, found.held_out_index)
  assert swapped.closer_to_train_share.value == pytest.approx(1 - found.closer_to_train_share.value, rel=1e-12)
  assert swapped.mirrored == pytest.approx(found.memorised_share.value / found.chance, rel=1e-12)
  assert swapped.closer_p == pytest.approx(1 - found.closer_p, rel=1e-9)
  values = lambda s: [s.memorised_share.value, *s.memorised_share.ci, s.closer_to_train_share.value, s.threshold,
                      *s.closer_to_train_share.ci, s.memorised_p, s.closer_p, s.split_p, s.median_ratio]
  for other in (look(x, train, held_out, chunk=33), look(x[::-1], train[::-1], held_out[::-1]),
                look(7 * x + 3, 7 * train + 3, 7 * held_out + 3)):
    np.testing.assert_allclose(values(other), values(found), rtol=1e-6)
  assert (np.diff(found.ratio[found.closest]) >= 0).all()


def test_the_part_of_the_larger_set_is_seeded_and_copies_are_sought_in_all_of_it():
  rng = np.random.default_rng(0)
  train, held_out = normal(rng, 400), normal(rng, 50)
  found = look(train, train, held_out)
  assert not found.to_train.any() and found.memorised_share.value == 1
  np.testing.assert_array_equal(found.train_index, np.arange(400))
  assert found.closer_to_train_share.value < 1  # an original outside the part compared is not seen
  x = normal(rng, 100)
  shares = [look(x, train, held_out, seed=seed).closer_to_train_share.value for seed in (0, 0, 1, 2, 3)]
  assert shares[0] == shares[1] and len(set(shares)) > 1


def test_an_image_in_both_sets_counts_for_neither():
  rng = np.random.default_rng(0)
  train, held_out = normal(rng, 300), normal(rng, 300)
  held_out[0] = train[0]
  found = look(np.tile(train[:1], (40, 1)), train, held_out)
  np.testing.assert_array_equal(found.ratio, 1)
  assert found.closer_to_train_share.value == 0.5
  assert found.memorised_share.value == 0


def test_a_split_that_is_not_random_is_seen():
  rng = np.random.default_rng(0)
  train, held_out = normal(rng, 200), normal(rng, 200)
  assert look(normal(rng, 50), train, held_out).split_p > audit.SPLIT
  assert look(normal(rng, 50), train, held_out + 1.5).split_p < 1e-6


def test_digits_with_a_little_noise_are_flagged_and_other_digits_are_not(tmp_path):
  train, _ = sources.arrays(sources.load('digits', 'train'))
  held_out, _ = sources.arrays(sources.load('digits', 'test'))
  rng = np.random.default_rng(0)
  noisy = np.clip(train[:300].astype(int) + rng.integers(-1, 2, (300, 8, 8, 1)), 0, 255).astype(np.uint8)
  few = np.concatenate([train[1000:1285], noisy[:15]])
  for images, seen, flagged in ((noisy, train, 1), (held_out[:250], train, 0), (few, train[:900], 1)):
    records = audit.run(tmp_path, images, {}, (seen, {}), (held_out[250:], {}))
    assert records[-1]['metric'] == f'memorisation_flagged_{len(images)}'
    assert records[-1]['value'] == flagged
    assert records[-1]['flagged_in'] == ['pixels'] * flagged


def test_a_run_writes_its_records_distances_and_pictures(tmp_path):
  """Each sample stands left of its nearest training and held-out image, the closest first."""
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(0, 256, (n, 8, 4, 3)).astype(np.uint8)
  train, held_out, images = draw(40), draw(40), draw(60)
  images[17] = train[5]
  seen = [{'mean': x.mean((1, 2))} for x in (images, train, held_out)]
  records = audit.run(tmp_path, images, seen[0], (train, seen[1]), (held_out, seen[2]))
  names = [f'{metric}_{space}_60' for space in ('mean', 'pixels')
           for metric in ('memorised_share', 'closer_to_train_share', 'memorisation_ratio_median')]
  assert [r['metric'] for r in records] == [*names, 'memorisation_flagged_60']
  for r in records:
    assert r['unit'] == '' and r['training_images'] == r['held_out_images'] == 40
    assert r['ci'] is None or r['ci'][0] <= r['value'] <= r['ci'][1]
  with np.load(tmp_path / 'audit.npz', allow_pickle=False) as found:
    assert found['pixels_closest'][0] == 17 and found['pixels_to_train'][17] == 0
    assert found['pixels_train_index'][17] == 5 and len(found['mean_ratio']) == len(found['id']) == 60
    other = held_out[found['pixels_held_out_index'][17]]
    assert found['pixels_to_held_out'][17] == pytest.approx(np.linalg.norm(images[17] * 1.0 - other), rel=1e-12)
  picture = np.asarray(Image.open(tmp_path / 'audit.png'))
  big = np.concatenate([train[5], train[5], other], axis=1).repeat(4, 0).repeat(4, 1)
  for top in (0, 329 + 8):  # ten rows of each space, 32 pixels and a line high
    np.testing.assert_array_equal(picture[top:top + 32, :32], big[:, :32])
  np.testing.assert_array_equal(picture[337:337 + 32, :48], big)
  assert picture.shape == (2 * 329 + 8, 5 * 49 - 1, 3)


def test_volumes_have_no_picture_and_a_bad_split_a_warning(tmp_path, capsys):
  rng = np.random.default_rng(0)
  draw = lambda n, low: rng.integers(low, low + 100, (n, 4, 4, 4, 1)).astype(np.uint8)
  with pytest.warns(UserWarning, match='draw the held-out split at random'):
    records = audit.run(tmp_path, draw(30, 0), {}, (draw(200, 0), {}), (draw(200, 50), {}))
  assert records[-1]['held_out_unlike_train_in'] == ['pixels']
  assert 'no picture of the closest pairs' in capsys.readouterr().out
  assert [path.name for path in tmp_path.iterdir()] == ['audit.npz']


def test_what_cannot_be_audited_is_said_in_a_sentence(tmp_path):
  rng = np.random.default_rng(0)
  draw = lambda n, size=8: rng.integers(0, 256, (n, size, size, 1)).astype(np.uint8)
  train, held_out, images = draw(50), draw(50), draw(30)
  spoiled = np.concatenate([train[:5], held_out])
  for arguments, words in [
      ((images, {}, (train, {}), (held_out[:19], {})), 'at least 20 held-out images to compare with, got 19'),
      ((images, {}, (train[:5], {}), (held_out, {})), 'at least 20 training images to compare with, got 5'),
      ((draw(30, 4), {}, (train, {}), (held_out, {})), 'one dimension, got 16 and 64'),
      ((images, {'a': np.zeros((29, 3))}, (train, {}), (held_out, {})), '30 images and 29 of their features'),
      ((images, {'a': np.zeros((30, 3))}, (train, {}), (held_out, {})), 'the same spaces'),
      ((images, {}, (train, {}), (spoiled, {})), '5 of 55 held-out images are copies of training images')]:
    with pytest.raises(UserError, match=words) as error:
      audit.run(tmp_path, *arguments)
    assert '\n' not in str(error.value)
  assert not list(tmp_path.iterdir())
  with pytest.raises(ValueError, match='51 neighbours were asked for among 50'):
    memorisation.nearest(np.zeros((2, 3)), np.zeros((50, 3)), 51)
