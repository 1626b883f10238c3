"""Are samples copies of training images? A comparison with held-out images, in numpy on the host.

The measure is the ratio of a sample's distance to its nearest training image over that to its nearest held-out image:
what is merely dull or blurred is near to both. Two questions are asked of it, in pixels or in features.

Near copies: is the ratio lower than it is for real images? Each held-out image is measured as a sample is, against the
training images and the other held-out images. The threshold is the j-th lowest of these m ratios, j / (m + 1) at most
RATE or else j = 1. Of N fresh images, Beta-binomial(N, j, m + 1 - j) lie below it, whatever the distribution (Wilks
1942, for order statistics). All images are used, so that no copy is missed; unlike numbers cancel in the comparison.
A model of few, simple images, such as a strong guidance makes, has more near neighbours of both kinds: its near copies
of held-out images, counted alike with the two sets swapped, are a second comparison (a rough one where m is below some
thousand: the threshold rests on j images).

Closer to train: is the nearest of all images a training one more often than a held-out one? Sets of equal size are
compared (a random part of the larger one). If the samples owe nothing to the training images beyond their distribution,
then training and held-out images could change places, and that permutation gives the share its exact mean 1/2 and
variance. It counts how unequally the samples choose their neighbours: some images are the nearest of many.
The question is that of Meehan et al. 2020 (A non-parametric test to detect data-copying); the test is another.

Both rest on a split that was drawn at random, and `split_p` says whether it looks so.
"""
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import scipy.special

from diffusion_jax.metrics.frechet import checked
from diffusion_jax.metrics.intervals import Estimate, proportion

CHUNK = 2048
RATE = 0.01         # of real images that count as near copies
LEVEL = 0.005       # of an audit's tests together; false alarms are less than 1 % (simulated in the tests)
SPARE = 4           # neighbours measured beyond the k asked for, since the quick distances are rounded
TWICE, MANY = 2.0, 0.6  # what is worth an alarm: twice the near copies of real images, or 20 % copies (1/2 + 20 % / 2)
HELD_OUT = 20       # fewest held-out images, and fewest training ones


class Space(NamedTuple):
  """What the distances of one space say. Arrays have one row for each of N samples."""
  memorised_share: Estimate        # of samples below the threshold; Wilson's interval
  chance: float                    # that share's mean for fresh images
  mirrored: float                  # near copies of held-out images instead, over what chance gives
  threshold: float                 # ratio below which a sample is a near copy
  closer_to_train_share: Estimate  # 1/2 for fresh images; Wilson's interval for N^2 / sum n_i^2 samples (see `_owned`)
  median_ratio: float
  memorised_p: float               # how often fresh images would have such a share or a larger one
  closer_p: float
  split_p: float                   # how often a random split would have held-out images so near or far
  copies: bool                     # whether the first share raises the alarm
  closer: bool                     # whether the second does
  ratio: np.ndarray                # [N] to_train / to_held_out; 1 where both are 0
  to_train: np.ndarray             # [N]
  to_held_out: np.ndarray          # [N]
  train_index: np.ndarray          # [N] which training image is nearest
  held_out_index: np.ndarray       # [N]
  closest: np.ndarray              # [N] the samples in order of ratio, then of to_train

  @property
  def flagged(self) -> bool:
    """Whether this space raises the alarm."""
    return self.copies or self.closer


class Audit(NamedTuple):
  """What each space says, and whether any of them raises the alarm."""
  spaces: dict[str, Space]
  flagged: bool


def nearest(queries: np.ndarray, references: np.ndarray, k: int = 1, own: np.ndarray | None = None,
            chunk: int = CHUNK) -> tuple[np.ndarray, np.ndarray]:
  """Distances [N, k] float64 to the k nearest of references [M, D], nearest first, and their indices [N, k].

  queries [N, D]; either may be uint8. own [N]: which reference each query is itself, and is no neighbour of its own.
  Candidates come from products of matrices; their distances are then measured directly, so that a copy's is exactly 0.
  Memory beyond the arguments: about 4 chunk D + 6 chunk^2 float64, 0.4 GB for 3072 pixels; 50,000 x 50,000 of these
  take 10 minutes of a 2.5 GHz core. Raises ValueError for sets that do not match, values that are not finite, and k
  beyond the number of references.
  """
  queries, references = checked(queries, references)
  others = len(references) - (own is not None)
  if not 1 <= k <= others:
    raise ValueError(f'{k} neighbours were asked for among {others}: ask for 1 to as many')
  centre = references.mean(0, dtype=np.float64)  # products of values far from 0 would lose their digits
  distances, indices = np.empty((len(queries), k)), np.empty((len(queries), k), int)
  for i in range(0, len(queries), chunk):
    a = queries[i:i + chunk] - centre
    rows = np.arange(len(a))
    squared, owners = np.empty((len(a), 0)), np.empty((len(a), 0), int)
    for j in range(0, len(references), chunk):
      b = references[j:j + chunk] - centre
      new = np.sum(a * a, 1)[:, None] + np.sum(b * b, 1)
      new -= 2 * (a @ b.T)
      if own is not None:
        new[own[i:i + chunk, None] == np.arange(j, j + len(b))] = np.inf
      squared = np.concatenate([squared, new], 1)
      owners = np.concatenate([owners, np.broadcast_to(np.arange(j, j + len(b)), new.shape)], 1)
      kept = min(k + SPARE, squared.shape[1])
      order = np.argpartition(squared, kept - 1, axis=1)[:, :kept]
      squared, owners = np.take_along_axis(squared, order, 1), np.take_along_axis(owners, order, 1)
    for c in range(owners.shape[1]):
      exact = queries[i:i + chunk].astype(np.float64) - references[owners[:, c]]
      squared[:, c] = np.where(np.isinf(squared[:, c]), np.inf, np.sum(exact * exact, 1))
    order = np.lexsort((owners, squared), axis=1)[:, :k]  # of equal distances the first index
    distances[i:i + chunk] = np.sqrt(squared[rows[:, None], order])
    indices[i:i + chunk] = owners[rows[:, None], order]
  return distances, indices


def audit(generated: Mapping[str, np.ndarray], train: Mapping[str, np.ndarray], held_out: Mapping[str, np.ndarray],
          seed: int = 0, chunk: int = CHUNK) -> Audit:
  """Compares samples with training and held-out images in each space: {'pixels': [N, D], 'digits': [N, E], ...}.

  A space raises the alarm if its share of near copies is at least twice what chance gives, and twice what it is with
  the sets swapped, or its share of samples closer to train at least 0.6, and chance gives it or a larger one with a
  probability below LEVEL / (2 spaces) (Bonferroni). seed: which part of the larger set is compared with the smaller.
  Raises ValueError for spaces or dimensions that differ, fewer than 20 training or held-out images, and a split that
  shares its images.
  """
  if not set(generated) == set(train) == set(held_out) or not generated:
    raise ValueError(f'the samples, training and held-out images must be given in the same spaces, got '
                     f'{sorted(generated)}, {sorted(train)} and {sorted(held_out)}')
  level = LEVEL / (2 * len(generated))
  spaces = {name: _space(name, generated[name], train[name], held_out[name], seed, level, chunk) for name in generated}
  return Audit(spaces, any(s.flagged for s in spaces.values()))


def _space(name, generated, train, held_out, seed, level, chunk):
  generated, train, held_out = checked(generated, train, held_out)
  n, m, samples = len(train), len(held_out), len(generated)
  for what, count in (('training', n), ('held-out', m)):
    if count < HELD_OUT:
      raise ValueError(f'an audit needs at least {HELD_OUT} {what} images to compare with, got {count}')
  half, chosen = min(n, m), np.random.default_rng(seed)
  to_train, to_train_half = _two(generated, train, half, chosen, chunk)
  to_held_out, to_held_out_half = _two(generated, held_out, half, chosen, chunk)

  real_train = tuple(a[:, 0] for a in nearest(held_out, train, chunk=chunk))
  real_held_out = tuple(a[:, 0] for a in nearest(held_out, held_out, own=np.arange(m), chunk=chunk))
  real = _ratio(real_train[0], real_held_out[0])
  threshold, j = _low(real)
  if threshold == 0:
    raise ValueError(f'{np.sum(real == 0)} of {m} held-out images are copies of training images ({name}): take copies '
                     f'out of the held-out split, or nothing can be told from it')
  some = np.sort(chosen.permutation(n)[:half])  # training images, measured as the held-out ones were
  swapped, i = _low(_ratio(nearest(train[some], held_out, chunk=chunk)[0][:, 0],
                           nearest(train[some], train, own=some, chunk=chunk)[0][:, 0]))
  mirrored = float(np.mean(_ratio(to_held_out[0], to_train[0]) < swapped)) * (half + 1) / i
  ratio = _ratio(to_train[0], to_held_out[0])
  copies = int(np.sum(ratio < threshold))
  share, chance = copies / samples, j / (m + 1)
  memorised_p = _beta_binomial_tail(copies, samples, j, m + 1 - j)

  closer, effective, z = _owned(to_train_half, to_held_out_half, half, half)
  closer_p = float(scipy.special.ndtr(-z))
  _, _, z = _owned(real_train, real_held_out, n, m)
  split_p = float(2 * scipy.special.ndtr(-abs(z)))
  alarms = (memorised_p < level and share >= TWICE * chance * max(1.0, mirrored),
            closer_p < level and closer >= MANY)
  return Space(_wilson(share, samples), chance, mirrored, threshold, _wilson(closer, effective),
               float(np.median(ratio)), memorised_p, closer_p, split_p, *alarms, ratio, to_train[0], to_held_out[0],
               to_train[1], to_held_out[1], np.lexsort((to_train[0], ratio)))


def _two(queries, references, half, rng, chunk):
  """(distances [N], indices [N]) to the nearest of all references, and of a random `half` of them."""
  chosen = np.sort(rng.permutation(len(references))[:half])
  near, at = (a[:, 0] for a in nearest(queries, references[chosen], chunk=chunk))
  part = near, chosen[at]
  if half == len(references):
    return part, part
  near, at = (a[:, 0] for a in nearest(queries, references, chunk=chunk))
  return (near, at), part


def _low(ratios):
  """The ratio that is the j-th lowest, and j."""
  j = max(1, int(RATE * (len(ratios) + 1)))
  return float(np.sort(ratios)[j - 1]), j


def _wilson(share, trials):
  low, high = proportion(share * trials, trials)
  return Estimate(share, (min(low, share), max(high, share)))  # at 0 and 1 rounding would leave the share outside


def _ratio(a, b):
  with np.errstate(divide='ignore', invalid='ignore'):
    return np.where(a == b, 1.0, a / b)


def _beta_binomial_tail(k, trials, a, b):
  """The probability of k or more out of `trials`, each with one probability that is Beta(a, b)."""
  i = np.arange(k, trials + 1)
  choose = -np.log1p(trials) - scipy.special.betaln(trials - i + 1, i + 1)
  terms = choose + scipy.special.betaln(i + a, trials - i + b) - scipy.special.betaln(a, b)
  return min(1.0, float(np.sum(np.exp(terms))))


def _owned(to_train, to_held_out, n, m):
  """How many of N queries are nearest to one of n training images rather than one of m held-out ones.

  Each of (distances [N], indices [N]). Returns the share (a tie counts half); Kish's effective number of queries,
  N^2 / sum n_i^2 with n_i those whose nearest image is i; and the share's z score if the n + m images had their names
  drawn at random.
  """
  (a, i), (b, j) = to_train, to_held_out
  weight = (np.sign(b - a) + 1) / 2
  # A tie stands half with each image: its two halves cancel if the two have unlike names.
  counts = np.bincount(i, weight, n), np.bincount(j, 1 - weight, m)
  total, squares, images = len(a), sum(np.sum(c * c) for c in counts), n + m
  share = float(counts[0].sum() / total)
  variance = n * m / (images * (images - 1)) * (squares - total ** 2 / images)  # a sample drawn without replacement
  z = (counts[0].sum() - total * n / images) / math.sqrt(variance) if variance > 0 else 0.0
  return share, float(total ** 2 / squares), float(z)
