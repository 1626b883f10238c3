"""What is asked for, by case, and the figures that papers give: beside what is measured, reached or not."""
from collections.abc import Mapping
from typing import Any, NamedTuple


class Goal(NamedTuple):
  """kind: 'ratio' of a baseline's time to ours, 'peak' share of the product peak, 'published' images/s over a paper's,
  each at least `value`; or 'percent' of a loop's time or 'ms' of ours, at most `value`.
  """
  kind: str
  value: float


class Published(NamedTuple):
  """A paper's images per second, of training, or of network evaluations where images are drawn."""
  rate: float
  where: str   # the hardware that made them
  source: str


GOALS = {
    'small_train': Goal('ratio', 1.5), 'small_sample_16': Goal('ratio', 2.6), 'small_sample_256': Goal('ratio', 1.3),
    'cifar10_forward': Goal('ratio', 1.0), 'cifar10_train': Goal('ratio', 0.95), 'overhead': Goal('percent', 3.0),
    'dispatch': Goal('ms', 0.5),
    'cifar10_train_bf16': Goal('ratio', 1.3), 'cifar10_sample_bf16': Goal('ratio', 1.5),
    'dit_b2_train_bf16': Goal('peak', 0.4), 'adm64_train_bf16': Goal('peak', 0.4),
    'edm_train_bf16': Goal('published', 8.0),
}
DDPM = 'DDPM (Ho et al. 2020, appendix B)'
EDM = 'EDM (Karras et al. 2022; README of the authors\' code'
_TRAINING = {
    # 21 steps a second of batch 128.
    'cifar10_train': Published(2688, 'a TPU v3-8', DDPM),
    # 256 images in 17 s, of 1000 evaluations each.
    'cifar10_sample': Published(256 * 1000 / 17, 'a TPU v3-8', DDPM),
    # 200 million images on 8 GPUs in about 2 days.
    'edm_train': Published(145, 'one V100', f'{EDM}: 200 million images, 8 V100, about 2 days)'),
    # 2500 million images on 32 GPUs in about 13 days.
    'adm64_train': Published(70, 'one A100', f'{EDM}: 2500 million images, 32 A100, about 13 days)'),
}
PUBLISHED = {f'{name}_{word}': found for name, found in _TRAINING.items() for word in ('bf16', 'f32')}


def rate(r: Mapping[str, Any]) -> float:
  """Images a second that ours makes of a record; network evaluations a second where it draws."""
  *_, ours = r['sides'].values()
  return ours['items_per_second'] * (r.get('steps') or 1)


def published(r: Mapping[str, Any]) -> str:
  """'8.1x of 145 images/s, one V100, EDM (...)', or ''."""
  found = PUBLISHED.get(r['case'])
  if not found:
    return ''
  unit = 'network evaluations/s' if r.get('steps') else 'images/s'
  return f'{rate(r) / found.rate:.1f}x of {found.rate:,.0f} {unit}, {found.where}, {found.source}'


def goal(r: Mapping[str, Any]) -> str:
  """'at least 1.5x: reached', 'not reached', or 'not told' where the interval holds the goal or there is no verdict."""
  found = GOALS.get(r['case'])
  if not found:
    return ''
  *_, ours = r['sides'].values()
  words = {'ratio': f'at least {found.value:g}x', 'peak': f'at least {100 * found.value:.0f} % of the peak',
           'published': f'at least {found.value:g}x of the published', 'percent': f'at most {found.value:g} %',
           'ms': f'at most {found.value:g} ms'}[found.kind]
  interval = {'ratio': r['interval'], 'percent': r['interval'] and [1 - x for x in reversed(r['interval'])],
              'peak': [ours.get('peak_share')] * 2, 'ms': [ours['median_ms']] * 2,
              'published': [rate(r) / PUBLISHED[r['case']].rate if r['case'] in PUBLISHED else None] * 2}[found.kind]
  if not interval or interval[0] is None:
    return f'{words}: not measured'
  if 'verdict' in r['verdict']:  # too noisy, or too busy, for one
    return f'{words}: not told'
  bound, (low, high) = found.value / (100 if found.kind == 'percent' else 1), interval
  if found.kind in ('percent', 'ms'):
    low, high, bound = -high, -low, -bound
  return f'{words}: {"reached" if low >= bound else "not reached" if high < bound else "not told"}'
