"""Pictures of several runs: cut to what a page can hold, the same rows of all, and levels found where they are."""
import io
import re

import numpy as np
import pytest
from PIL import Image
from test_report import make_run, png, put

from diffusion_jax import gallery, records, report, sample


def noise(height, width, mode='RGB', seed=0):
  """An image that no compression makes smaller, as the bytes of a PNG."""
  channels = {'L': (), 'P': (), 'RGB': (3,), 'RGBA': (4,)}[mode]
  image = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)
  buffer = io.BytesIO()
  made = Image.fromarray(image)
  (made.convert('P') if mode == 'P' else made).save(buffer, 'PNG')
  return buffer.getvalue()


def pixels(data):
  return np.asarray(Image.open(io.BytesIO(data)).convert('RGBA'))


@pytest.mark.parametrize('mode', ['L', 'P', 'RGB', 'RGBA'])
@pytest.mark.parametrize('height', [1, 7, 40])
def test_the_top_of_a_picture_is_its_upper_rows(mode, height):
  whole = noise(40, 31, mode)
  np.testing.assert_array_equal(pixels(gallery.top(whole, height)), pixels(whole)[:height])


def test_the_top_of_a_smooth_picture_too():
  """Whose rows are stored as differences to the rows above."""
  ramp = np.add.outer(np.arange(64) * 2, np.arange(48)).astype(np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(np.stack([ramp, ramp[::-1], ramp], -1)).save(buffer, 'PNG', optimize=True)
  np.testing.assert_array_equal(pixels(gallery.top(buffer.getvalue(), 20)), pixels(buffer.getvalue())[:20])


@pytest.mark.parametrize('broken', [
  lambda data: data[:60], lambda data: data[:33] + data[-12:], lambda data: data[:28] + b'\1' + data[29:],
  lambda data: data[:25] + b'\7' + data[26:], lambda data: data.replace(b'IDAT', b'iDAT')])
def test_a_broken_picture_has_no_top(broken):
  assert gallery.top(broken(noise(40, 31)), 10) is None


def runs_with(folder, count, shape, file, picture):
  """Runs of images of this shape with this picture each."""
  for i in range(count):
    put(folder / f'{i}/config.json', {})
    put(folder / f'{i}/data.json', {'shape': shape})
    path = folder / f'{i}/samples/final/{file}'
    path.parent.mkdir(parents=True)
    path.write_bytes(picture(i))
  return records.read_runs([folder / str(i) for i in range(count)])


def test_every_run_shows_the_same_rows_and_together_they_fit(tmp_path):
  runs = runs_with(tmp_path, 5, [32, 32, 3], 'grid.png', lambda i: noise(10 * 33 - 1, 10 * 33 - 1 - 33 * i, seed=i))
  pictures = [(run, run.folder / 'samples/final/grid.png') for run in runs]
  share = 600_000
  kept, rows = gallery.fitting(pictures, share)
  assert len(kept) == 5 and 1 <= rows < 10 and sum(len(data) for *_, data in kept) <= share
  assert {gallery.size(data)[1] for *_, data in kept} == {rows * 33}
  for _, path, data in kept:
    np.testing.assert_array_equal(pixels(data), pixels(path.read_bytes())[:rows * 33])
  whole, rows = gallery.fitting(pictures, 10_000_000)
  assert rows == 0 and [data for *_, data in whole] == [path.read_bytes() for _, path in pictures]


@pytest.mark.parametrize('shape', [(8, 8, 1), (32, 32, 3), (64, 48, 3)])
@pytest.mark.parametrize('levels', [2, 5, 12])
def test_the_levels_of_a_strip_are_where_sampling_puts_them(tmp_path, shape, levels):
  picture = sample.png(sample.tile(np.zeros((4 * levels, *shape), np.uint8), levels))
  run, = runs_with(tmp_path, 1, list(shape), 'strip.png', lambda i: picture)
  at, (width, height) = gallery.layout(run, picture), gallery.size(picture)
  scale = max(1, 32 // max(shape[:2]))
  assert (at.levels, at.rows) == (levels, 4)
  assert (at.step * width, at.row * height) == ((shape[1] + 1) * scale, (shape[0] + 1) * scale)
  assert gallery.layout(run, gallery.top(picture, 2 * (shape[0] + 1) * scale)).rows == 2
  assert f'data-levels="{levels}"' in gallery.denoising([run])


@pytest.mark.parametrize('shape', [None, 3, [8], [8, 8, 'x'], [0, 0, 0], [9, 9, 1], [10**9, 8, 3]])
def test_a_strip_of_unknown_levels_is_shown_whole(tmp_path, shape):
  run, = runs_with(tmp_path, 1, shape, 'strip.png', lambda i: png(5 * 36 - 4, 68))
  assert gallery.layout(run, png(5 * 36 - 4, 68)) is None
  source = gallery.denoising([run])
  assert '<img' in source and 'data-levels' not in source


def test_runs_of_one_seed_are_neighbours(tmp_path):
  for name in 'ab':
    for seed in range(2):
      folder = make_run(tmp_path / f'{name}{seed}')
      put(folder / 'point.json', {'run': name, 'seed': seed})
      put(folder / 'config.json', {'name': name, 'seed': seed})
  runs = records.read_runs([tmp_path / folder for folder in ('a0', 'a1', 'b0', 'b1')])
  assert re.findall('data-name="(.*?)"', gallery.samples(runs)) == ['a-s0', 'b-s0', 'a-s1', 'b-s1']


def test_a_page_of_fifty_runs_with_large_pictures_is_below_five_megabytes(tmp_path):
  grid, strip, audit = noise(329, 329), noise(263, 395), noise(300, 300)
  runs = runs_with(tmp_path, 50, [32, 32, 3], 'grid.png', lambda i: grid)
  for run in runs:
    (run.folder / 'samples/final/strip.png').write_bytes(strip)
    (run.folder / 'eval/ab').mkdir(parents=True)
    (run.folder / 'eval/ab/audit.png').write_bytes(audit)
  source = report.page(runs)
  assert len(source.encode()) < 5e6
  assert source.count('<div class="one"') == 50  # each run has its samples
  assert source.count('class="strip"') > 0 and 'Too large for this page' in source
