"""The curves of training and of the noise schedule, overlaid; runs of several seeds as their mean over their range.

With the standard library alone, like `report`, whose parts these are.
"""
import itertools
from collections.abc import Sequence

from diffusion_jax import records, svg
from diffusion_jax.records import Run
from diffusion_jax.svg import number, numbers


def training(runs: Sequence[Run]) -> str:
  """The loss as training went on, where on the noise path it is now, and where training was spent."""
  losses, bins, efforts = [], [], []
  for label, members in labelled(runs):
    ways = [[(number(line.get('images')), number(line.get('loss'))) for line in run.metrics] for run in members]
    points, band = svg.together([[point for point in way if point[0] is not None] for way in ways if way])
    thin, spread = svg.thinned(points)
    if band:  # of seeds, which says more than that of neighbours
      low, high = (svg.thinned([(row[0], row[i]) for row in band])[0] for i in (1, 2))
      spread = [(at, a, b) for (at, a), (_, b) in zip(low, high, strict=True)]
    losses.append(svg.Series(label, thin, members[0].colour, band=spread))
    for series, of in (bins, loss_by_logsnr), (efforts, effort):
      points, band = svg.together([found for run in members if (found := of(run))])
      series.append(svg.Series(label, points, members[0].colour, band=band))
  charts = [svg.chart('Loss', 'images seen', losses, log=True),
            svg.chart('Loss by logsnr', 'logsnr, from noise to data', bins, log=True),
            svg.chart('Density of training effort', 'logsnr, from noise to data', efforts)]
  return svg.pair(*charts)


def labelled(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
  """The runs by name, and how a curve of each name is called."""
  return [(members[0].label if len(members) == 1 else f'{group}, mean of {len(members)} seeds', members)
          for group, members in records.groups_of(runs).items()]


def loss_by_logsnr(run: Run) -> list:
  """The outline of the newest histogram of losses; an empty bin is a gap."""
  for line in reversed(run.metrics):
    edges, values = numbers(line.get('logsnr_bins')), numbers(line.get('loss_by_logsnr'))
    if len(edges) == len(values) + 1 and any(value is not None for value in values):
      return outline(edges, values)
  return []


def effort(run: Run) -> list:
  """The outline of the density of the levels that training drew, over the whole of it; [] where none were counted."""
  edges, total = [], []
  for line in run.metrics:
    bins, counts = numbers(line.get('logsnr_bins')), numbers(line.get('count_by_logsnr'))
    if None in bins + counts or len(bins) != len(counts) + 1 or not counts or (edges and bins != edges):
      continue
    edges, total = bins, [a + b for a, b in zip(counts, total or [0] * len(counts), strict=True)]
  whole, widths = sum(total), [b - a for a, b in itertools.pairwise(edges)]
  if whole <= 0 or min(widths) <= 0:
    return []
  return outline(edges, [count / whole / width for count, width in zip(total, widths, strict=True)])


def outline(edges: list, values: list) -> list:
  """A histogram as a curve."""
  return [(edge, value) for i, value in enumerate(values) for edge in edges[i:i + 2]]


def schedule(runs: Sequence[Run]) -> str:
  """alpha and sigma, and logsnr, against t."""
  scales, logsnrs = [], []
  for label, (run, *others) in labelled(runs):
    colour = run.colour
    label = run.group if others else label  # seeds have one schedule
    alpha, sigma, logsnr = (list(zip(numbers(run.schedule.get('t')), numbers(run.schedule.get(key)), strict=False))
                            for key in ('alpha', 'sigma', 'logsnr'))
    if len(runs) == 1:
      scales += [svg.Series('alpha', alpha, 0), svg.Series('sigma', sigma, 1)]
    else:  # a colour is a name, so that sigma is told by its dashes
      scales.append(svg.Series(f'{label}, alpha', alpha, colour))
      scales.append(svg.Series(f'{label}, sigma', sigma, colour, dashed=True))
    logsnrs.append(svg.Series(label, logsnr, colour))
  log = any(y is not None and y > 10 for s in scales for _, y in s.points)  # a ve path needs decades
  charts = [svg.chart('alpha and sigma', 't, from data to noise', scales, log),
            svg.chart('logsnr', 't, from data to noise', logsnrs)]
  return svg.pair(*charts)
