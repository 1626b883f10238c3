"""The page holds what the records say, whatever they say, and nothing from anywhere else."""

import base64
import hashlib
import json
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from diffusion_jax import report

SECTIONS = ['Samples', 'Evaluation', 'Training', 'Denoising', 'Schedule', 'Config', 'Provenance']
CARD = {
  'source': 'tfds:cifar10', 'split': 'train', 'licence': 'CC BY 4.0', 'num_examples': 50000, 'shape': [32, 32, 3],
  'hash': 'ab12', 'classes': {'cat': 30000, 'dog': 20000},
  'mean': [.5, .4, .3], 'std': [.25, .25, .25], 'bad_records': 3,
  'duplicates': {'count': 7, 'groups': 5, 'contradictory': 1}, 'held_out': {'split': 'test', 'overlap': 4}, 'bytes': 9}
HOSTILE = [
  '<script>alert(1)</script>', '"><img onerror=alert(1) src=x>', "' onload='x", '</style></title>', '&lt; {0} $body']
GIF = base64.b64decode('R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7')


class Page(HTMLParser):
  """The elements and words of a page; fails where tags are not balanced."""
  VOID = ('meta', 'link', 'img', 'input', 'br', 'wbr')

  def __init__(self, source):
    super().__init__()
    self.open, self.tags, self.words = [], [], []
    self.feed(source)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.words.append(data)

  def all(self, tag, **attrs):
    return [found for name, found in self.tags if name == tag and attrs.items() <= found.items()]

  @property
  def text(self):
    return ' '.join(''.join(self.words).split())


def png(width=18, height=9):
  chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
  header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
  pixels = zlib.compress((b'\0' + b'\x80' * width) * height)
  return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')


def put(path, *records):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(map(json.dumps, records)))


def measured(metric, value, ci=None, **changes):
  return {
    'metric': metric, 'value': value, 'ci': ci, 'step': 20, 'images': 64000, 'ema': 'main', 'sampler': 'ddim(eta=0.0)',
    'grid': 'trailing', 'nfe': 50, 'guidance': 1.0, 'seed': 0, 'num_samples': 500, 'reference_hash': 'ab12',
    'device': 'cpu x2', 'versions': {'jax': '0.10.2'}} | changes


def line(step, loss, **more):
  return {'step': step, 'images': 3200 * step, 'seconds': 2.9 * step, 'loss': loss} | more


def make_run(folder, word='digits'):
  """A folder with every record in it; `word` stands wherever a record holds a string."""
  put(folder / 'config.json', {
    word: word, 'process': {'fn': 'diffusion_jax.core.schedules:cosine', 'shift': 1.0, 'path': {'fn': f'm:{word}'}}})
  put(folder / 'run.json', {
    'started': word, 'device': word, 'versions': {word: word}, 'git_revision': word, 'parameters': 1234567,
    'command': ['train', word]})
  put(folder / 'schedule.json', {
    't': [0, .5, 1], 'logsnr': [None, 0, None], 'alpha': [1, .7, 0], 'sigma': [0, .7, 1]})
  put(folder / 'metrics.jsonl', *(
    line(i, 1 / i, logsnr_bins=[-1, 0, 1], loss_by_logsnr=[.5, None]) for i in range(1, 21)))
  put(folder / 'eval.jsonl', measured(word, .5, sampler=word, grid=word, ema=word),
      measured('fd_digits', 9.354, [8.701, 9.916]), measured('fd_digits_floor', 5.5), measured('compile_seconds', 75),
      measured('samples_per_second', 812.3, device=word), measured('peak_memory_bytes', 3 * 2**29))
  put(folder / 'done.json', {'images': 64000, 'seconds': 58, 'images_per_second': 1103.4, 'fingerprint': word})
  for name in ('000000000', '000032000', '000064000', 'final/grid', 'final/strip'):
    path = folder / f'samples/{name}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png())
  (folder / 'samples/final/trajectory.gif').write_bytes(GIF)
  return folder


def made(*folders):
  """The page of these runs and its source."""
  source = report.page(report.read_runs(folders))
  return Page(source), source


def curves(page):
  return [found['d'] for found in page.all('path') if found['class'].startswith('curve')]


def test_a_full_run_shows_every_section(tmp_path):
  page, _ = made(make_run(tmp_path / 'run'))
  assert [found['id'] for found in page.all('section')] == [title.lower() for title in SECTIONS]
  assert len(page.all('h1')) == 1 and len(page.all('h2')) == len(SECTIONS)
  titles = ('Loss', 'Loss by logsnr', 'alpha and sigma', 'logsnr')
  assert [found['aria-label'] for found in page.all('svg')] == list(titles)
  assert len(page.all('img')) == 6
  assert all(found['alt'] and found['src'].startswith('data:image/') for found in page.all('img'))
  for words in ('fd_digits 9.35 (95 % interval 8.70 to 9.92; real held-out images score 5.50) from 500 samples, '
                '50 network calls each, 812 samples per second on digits; trained on 64,000 images in 58 s.',
                '9.35 [8.70, 9.92]', '1 min 15 s', '1.5 GiB', '1,234,567', 'cosine(shift=1.0, path=digits())', 'ab12'):
    assert words in page.text, words


def test_the_page_loads_nothing(tmp_path):
  page, source = made(make_run(tmp_path / 'run'))
  for _, attrs in page.tags:
    for value in (attrs.get('src'), attrs.get('href')):
      assert value is None or value.startswith(('data:', '#'))
  assert not re.search(r'https?:|url\(|@import', source)
  [policy] = page.all('meta', **{'http-equiv': 'Content-Security-Policy'})
  script, = re.findall('<script>(.*?)</script>', source, re.DOTALL)
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  assert policy['content'] == ("default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
                               f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'")
  assert page.all('script') == [{}] and 'innerHTML' not in script and 'eval' not in script


def made_of(folder, word):
  """The pages of runs whose every name and string is `word`: one run alone, and several of which one is bare."""
  name = word.replace('/', '|')
  full, odd = make_run(folder / f'{name} full', word), make_run(folder / f'{name} odd', word)
  bare = folder / f'{name} bare'
  (odd / 'samples/final').rename(odd / f'samples/{name}')
  put(odd / 'eval.jsonl', measured(f'fd_{word}', 1, [0, 2]), measured(f'fd_{word}_floor', .5))
  put(bare / 'config.json', {})
  return made(full), made(full, odd, bare)


@pytest.mark.parametrize('word', HOSTILE)
def test_records_cannot_write_markup(tmp_path, word):
  for (tame, _), (hostile, source) in zip(made_of(tmp_path, 'tame'), made_of(tmp_path, word), strict=True):
    assert [(tag, sorted(attrs)) for tag, attrs in hostile.tags] == [(tag, sorted(attrs)) for tag, attrs in tame.tags]
    assert word not in source or not re.search('[<"\']', word)
    assert ' '.join(word.split()) in hostile.text


def test_several_runs_are_overlaid(tmp_path):
  first, second = make_run(tmp_path / 'first'), make_run(tmp_path / 'second')
  one, _ = made(first)
  page, _ = made(first, second)
  assert len(page.all('svg')) == len(one.all('svg')) and len(curves(page)) == 2 * len(curves(one))
  names = 2  # in the table below the verdict
  assert len(page.all('th', scope='row')) == 2 * len(one.all('th', scope='row')) + names
  assert 'first, alpha' in page.text and 'second, sigma' in page.text
  assert {'curve c0', 'curve c1', 'curve c0 dashed', 'curve c1 dashed'} <= {p['class'] for p in page.all('path')}


def test_runs_of_one_name_are_told_apart(tmp_path):
  folders = [make_run(tmp_path / 'a/run'), make_run(tmp_path / 'b/run')]
  assert [run.label for run in report.read_runs(folders)] == list(map(str, folders))


def test_missing_records_name_the_command_that_makes_them(tmp_path):
  put(tmp_path / 'my run/config.json', {})
  page, _ = made(tmp_path / 'my run')
  assert [found['id'] for found in page.all('section')] == [title.lower() for title in SECTIONS]
  assert 'Not trained yet; not evaluated yet.' in page.text
  for command in ('sample', 'evaluate', 'train'):
    assert f"diffusion-jax {command} --workdir='{tmp_path / 'my run'}'" in page.text
  assert '--trajectory' in page.text


@pytest.mark.parametrize('name', ['run.json', 'schedule.json', 'done.json', 'metrics.jsonl', 'eval.jsonl'])
@pytest.mark.parametrize('content', [
  '', '{"step": 1, "lo', '[]', '3', '{}', '{"t": 3, "alpha": [null, "x"], "step": "1", "images": [], "metric": 5}'])
def test_a_broken_record_is_a_missing_one(tmp_path, name, content):
  folder = make_run(tmp_path / 'run')
  (folder / name).write_text(content)
  made(folder)


def test_half_written_lines_and_repeated_steps(tmp_path):
  folder = make_run(tmp_path / 'run')
  put(folder / 'metrics.jsonl', line(1, .1), line(3, 9.), line(2, 8.), line(2, .2), line(3, .3))
  whole = report.read_runs([folder])[0].metrics
  assert [(record['step'], record['loss']) for record in whole] == [(1, .1), (2, .2), (3, .3)]
  with open(folder / 'metrics.jsonl', 'a') as f:
    f.write('\n{"step": 4, "images": 12')
  assert report.read_runs([folder])[0].metrics == whole


def test_half_written_pictures_are_left_out(tmp_path):
  folder = make_run(tmp_path / 'run')
  (folder / 'samples/final/grid.png').write_bytes(png()[:12])
  page, _ = made(folder)
  assert len(page.all('img')) == 5 and 'grid.png is not a picture, or still being written.' in page.text


def test_the_newest_grid_of_training_is_large_and_at_most_eight_are_small(tmp_path):
  put(tmp_path / 'config.json', {})
  (tmp_path / 'samples').mkdir()
  for images in range(0, 3000, 100):
    (tmp_path / f'samples/{images:09d}.png').write_bytes(png())
  page, _ = made(tmp_path)
  large, *small = page.all('img')
  assert '2,900 images' in large['alt'] and len(small) == 8
  assert '0 images' in small[0]['alt'] and '2,800 images' in small[-1]['alt']
  # Whole factors keep the pixels of a digit square.
  assert all(int(found['width']) % 18 == 0 and found['class'] == 'pixels' for found in page.all('img'))
  assert int(large['width']) > int(small[0]['width'])


def test_evaluations_with_other_settings_have_their_own_rows(tmp_path):
  folder = make_run(tmp_path / 'run')
  put(folder / 'eval.jsonl', measured('fd_digits', 7., step=30, images=96000), measured('fd_digits', 14., nfe=10),
      measured('fd_digits', 9.), measured('accuracy_digits', .5), measured('fd_digits', 8.))
  page, _ = made(folder)
  assert len(page.all('th', scope='row')) == 3
  assert 'fd_digits 7.00 from 500 samples, 50 network calls each, after 96,000 images; trained on' in page.text


def test_other_sections_are_there_where_their_records_are(tmp_path):
  folder = make_run(tmp_path / 'run')
  put(folder / 'data_card.json', CARD)
  put(folder / 'likelihood/ab.json', {'logsnr': [0, 1], 'level_bits': [1, 2]})
  put(folder / 'eval.jsonl', *(measured('fid_5k', 9., nfe=nfe, steps=nfe) for nfe in (5, 10)),
      measured('memorised_share_pixels', .02, [.01, .03], flagged=True),
      measured('closer_to_train_share', .5, flagged=False))
  (folder / 'eval/1f').mkdir(parents=True)
  (folder / 'eval/1f/audit.png').write_bytes(png())
  bare = tmp_path / 'bare'
  put(bare / 'config.json', {})
  page, _ = made(folder, bare)
  assert [found['id'] for found in page.all('section')] == [
    'samples', 'evaluation', 'quality-against-cost', 'likelihood', 'memorisation', 'training', 'denoising', 'schedule',
    'data', 'config', 'provenance']
  links = [found['href'][1:] for found in page.all('a')]
  sections = [found['id'] for found in page.all('section')]
  assert links[:len(sections)] == sections
  anchors = [found['id'] for _, found in page.tags if found.get('id', '').startswith('record-')]
  assert len({*anchors}) == len(anchors) and {*links[len(sections):]} == {*anchors}  # each value and its record
  for words in ('memorised_share_pixels 0.0200 [0.0100, 0.0300] flagged as memorised',
                'closer_to_train_share 0.500 not flagged',
                'tfds:cifar10', 'CC BY 4.0', '50,000', '32 x 32 x 3',
                '2, of 20,000 to 30,000 images', 'cat 30,000',
                '7, in 5 groups, 1 groups with unlike labels', '4 in test', '0.500, 0.400, 0.300'):
    squeezed = ''.join(words.split())
    assert squeezed in ''.join(page.text.split()), words
  assert [found['alt'] for found in page.all('img') if 'nearest' in found['alt']] == [
    'Samples of run beside the training images that are nearest to them']


@pytest.mark.parametrize('odd', [None, 3, -1, 'x', [], [1, 'x', None], {}, {'a': 'b'}, {'a': -1}, {'a': 0}, True,
                                 *HOSTILE])
def test_a_data_card_may_hold_anything(tmp_path, odd):
  folder = make_run(tmp_path / 'run')
  nested = {str(odd): odd, f'{odd}<i>': 5, 'count': odd, 'overlap': odd, 'why': odd}
  for card in dict.fromkeys(CARD, odd), dict.fromkeys(CARD, nested), nested:
    put(folder / 'data_card.json', card)
    page, _ = made(folder)
    assert len(page.all('script')) == 1 and not page.all('i')
    assert not any('onerror' in attrs or 'onload' in attrs for _, attrs in page.tags)


@pytest.mark.parametrize('level, words', [(.9, '90 %'), (.999, '99.9 %'), (None, '95 %'), ('<b>', '95 %'), (3, '95 %')])
def test_an_interval_says_its_level(tmp_path, level, words):
  folder = make_run(tmp_path / 'run')
  put(folder / 'eval.jsonl', measured('fd_digits', 9., [8., 10.], ci_level=level))
  assert f'fd_digits 9.00 ({words} interval 8.00 to 10.00) from' in made(folder)[0].text


def test_the_command_writes_beside_the_run_or_where_it_is_told(tmp_path, capsys, monkeypatch):
  folder = make_run(tmp_path / 'run')
  monkeypatch.chdir(tmp_path)
  for argv, out in (([str(folder)], folder / 'report.html'), (['run', '--out', 'page.html'], Path('page.html')),
                    (['run', 'run'], Path('report.html'))):
    assert report.main(argv) == 0
    assert capsys.readouterr().out == f'{out}\n'
    Page(out.read_text('utf-8'))
  assert sorted(path.name for path in tmp_path.iterdir()) == ['page.html', 'report.html', 'run']


@pytest.mark.parametrize('config, words', [
  (None, 'has no config.json'), ('{"a": ', 'is not JSON'), ('[1]', 'is not a JSON object'), (b'\xff', 'is not JSON')])
def test_bad_input_is_answered_with_a_sentence(tmp_path, capsys, config, words):
  if config is not None:
    (tmp_path / 'config.json').write_bytes(config if isinstance(config, bytes) else config.encode())
  assert report.main([str(tmp_path)]) == 2
  said = capsys.readouterr()
  assert said.err.startswith('error: ') and words in said.err and said.err.count('\n') == 1 and not said.out
  assert not (tmp_path / 'report.html').exists()


def test_bad_folders_are_answered_with_a_sentence(tmp_path, capsys):
  run = str(make_run(tmp_path / 'run'))
  for argv in ([str(tmp_path / 'nowhere')], [run, '--out', str(tmp_path / 'nowhere/page.html')], [run, '--out', run]):
    assert report.main(argv) == 2
    assert re.fullmatch(r'error: .*\.\n', capsys.readouterr().err)


def test_strings_that_no_encoding_holds(tmp_path):
  folder = make_run(tmp_path / 'run', 'lone \ud800 surrogate')
  assert report.main([str(folder)]) == 0
  Page((folder / 'report.html').read_text('utf-8'))
