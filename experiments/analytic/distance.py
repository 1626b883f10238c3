"""How far a set of samples is from a set of data. Arrays [N, D], float64 on the host."""
import numpy as np


def wasserstein(a: np.ndarray, b: np.ndarray) -> float:
  """The Wasserstein-1 distance of two sets of N numbers [N] or [N, 1]: matched in order, exactly."""
  if np.size(a) != np.size(b):
    raise ValueError(f'the two sets must be of one size, got {np.size(a)} and {np.size(b)}')
  return float(np.mean(np.abs(np.sort(a, axis=None) - np.sort(b, axis=None))))


def sliced_wasserstein(a: np.ndarray, b: np.ndarray, directions: int = 32) -> float:
  """The mean of `wasserstein` over projections of the plane [N, 2] on equally spaced directions."""
  angle = np.pi * np.arange(directions) / directions
  axes = np.stack([np.cos(angle), np.sin(angle)])
  return float(np.mean(np.abs(np.sort(a @ axes, axis=0) - np.sort(b @ axes, axis=0))))


def energy(a: np.ndarray, b: np.ndarray) -> float:
  """The energy distance 2 E|a - b| - E|a - a'| - E|b - b'| of the two sets as they are (Székely & Rizzo 2013)."""
  return 2 * _spread(a, b) - _spread(a, a) - _spread(b, b)


def nearest(a: np.ndarray, points: np.ndarray) -> np.ndarray:
  """The distance of each a [N, D] to its nearest point, per square root of a dimension: the RMS over pixels [N]."""
  return np.sqrt(_squares(a, points).min(1) / a.shape[1])


def closest(a: np.ndarray, points: np.ndarray) -> np.ndarray:
  """The index of the point nearest to each a: [N]."""
  return _squares(a, points).argmin(1)


def _spread(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.mean(np.sqrt(_squares(a, b))))


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """|a - b|^2 of all pairs [N, M]."""
  return np.maximum(np.sum(a ** 2, 1)[:, None] + np.sum(b ** 2, 1) - 2 * a @ b.T, 0)
