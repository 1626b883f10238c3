"""The page in a browser: it says nothing to the console, obeys mouse, keyboard and theme, and fits a phone."""
import base64
import fcntl
import json
import os
import re
import select
import shutil
import signal
import time

import pytest
from test_report import HOSTILE, make_run, measured, png, put

from diffusion_jax import report

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
pytestmark = pytest.mark.skipif(not CHROMIUM, reason='no chromium is installed: the page is opened in none')
FLAGS = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--hide-scrollbars',
         '--disable-background-networking', '--remote-debugging-pipe']


class Browser:
  """Chromium over its debugging pipe: messages are JSON with a zero byte behind each."""

  def __init__(self, folder):
    (reads, self.to), (self.back, writes) = os.pipe(), os.pipe()
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for fd in (reads, writes)]  # out of the way of 3 and 4
    actions = [(os.POSIX_SPAWN_DUP2, theirs[0], 3), (os.POSIX_SPAWN_DUP2, theirs[1], 4),
               (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0), (os.POSIX_SPAWN_DUP2, 1, 2)]
    argv = [CHROMIUM, *FLAGS, f'--user-data-dir={folder}', 'about:blank']
    self.pid = os.posix_spawn(CHROMIUM, argv, {**os.environ, 'HOME': str(folder)}, file_actions=actions, setsid=True)
    for fd in (reads, writes, *theirs):
      os.close(fd)
    self.count, self.rest, self.events, self.session = 0, b'', [], None
    target = self.call('Target.createTarget', url='about:blank')['targetId']
    self.session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
    for domain in ('Page', 'Runtime', 'Log', 'Network'):
      self.call(f'{domain}.enable')

  def read(self, seconds=60):
    """The next message."""
    until = time.monotonic() + seconds
    while b'\0' not in self.rest:
      ready = select.select([self.back], [], [], max(0, until - time.monotonic()))[0]
      more = os.read(self.back, 1 << 16) if ready else b''
      assert more, 'the browser is gone, or says nothing'
      self.rest += more
    message, _, self.rest = self.rest.partition(b'\0')
    return json.loads(message)

  def call(self, method, **parameters):
    """What the browser answers; what happens meanwhile is kept in `events`."""
    self.count += 1
    message = {'id': self.count, 'method': method, 'params': parameters}
    message |= {'sessionId': self.session} if self.session else {}
    os.write(self.to, json.dumps(message).encode() + b'\0')
    while (answer := self.read()).get('id') != self.count:
      self.events.append(answer)
    assert 'error' not in answer, answer
    return answer['result']

  def open(self, path, width=1200, height=900, theme='light', scripts=True):
    """Loads a page; `events` then holds what it gave rise to."""
    self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
    self.call('Emulation.setEmulatedMedia', features=[{'name': 'prefers-color-scheme', 'value': theme}])
    self.call('Emulation.setScriptExecutionDisabled', value=not scripts)
    self.events = []
    self.call('Page.navigate', url=path.as_uri())
    while not any(event.get('method') == 'Page.loadEventFired' for event in self.events):
      self.events.append(self.read())

  def ask(self, code):
    """The value of an expression in the page."""
    found = self.call('Runtime.evaluate', expression=code, returnByValue=True)
    assert 'exceptionDetails' not in found, found
    return found['result'].get('value')

  def key(self, name):
    """Presses a key where the focus is."""
    for kind in ('keyDown', 'keyUp'):
      self.call('Input.dispatchKeyEvent', type=kind, key=name, code=name,
                windowsVirtualKeyCode={'Enter': 13, 'ArrowLeft': 37, 'ArrowRight': 39}[name])

  def complaints(self):
    """Whatever the page said to the console, violated of its policy, or asked of a network."""
    kinds = ('Runtime.consoleAPICalled', 'Runtime.exceptionThrown', 'Log.entryAdded')
    asked = [event['params']['request']['url'] for event in self.events
             if event.get('method') == 'Network.requestWillBeSent']
    return ([event['params'] for event in self.events if event.get('method') in kinds]
            + [url for url in asked if not url.startswith(('file:', 'data:'))])

  def picture(self, path):
    """A picture of the whole page, to be looked at."""
    path.write_bytes(base64.b64decode(self.call('Page.captureScreenshot', captureBeyondViewport=True)['data']))

  def close(self):
    os.killpg(self.pid, signal.SIGKILL)
    os.waitpid(self.pid, 0)
    for fd in (self.to, self.back):
      os.close(fd)


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  browser = Browser(tmp_path_factory.mktemp('profile'))
  yield browser
  browser.close()


NAMES = {'cosine': (8., 9., 10.), 'linear': (20., 21., 22.), HOSTILE[0].replace('/', '|'): (8.5, 9.5, 100.)}


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  """The page of three names with three seeds each, one of them hostile."""
  folder = tmp_path_factory.mktemp('runs')
  runs = []
  for i, (name, values) in enumerate(NAMES.items()):
    for seed, value in enumerate(values):
      run = make_run(folder / f'run{i}-{seed}', HOSTILE[(i + seed) % len(HOSTILE)])
      put(run / 'point.json', {'name': f'{name}-s{seed}', 'run': name, 'seed': seed})
      put(run / 'config.json', {'seed': seed, 'schedule': name})
      put(run / 'data.json', {'shape': [8, 8, 1]})
      put(run / 'eval.jsonl', measured('fid', value + 10, images=32000, step=10),
          measured('fid', value, [0, 2 * value]), *[measured('kid', value)] * bool(seed))
      (run / 'samples/final/strip.png').write_bytes(png(5 * 36 - 4, 4 * 36 - 4))
      runs.append(run)
  out = folder / 'page.html'
  assert report.main([*map(str, runs), '--out', str(out)]) == 0
  return out


def test_a_script_that_is_not_the_page_s_own_is_refused(browser, page, tmp_path):
  for change in (("'use strict';", "'use strict'; document.title = 'run';"),
                 ('<main>', '<main><script>document.title = "run"</script>'),
                 ('<main>', '<main><img src="x" onerror="document.title = `run`" alt="x">')):
    (tmp_path / 'changed.html').write_text(page.read_text('utf-8').replace(*change), 'utf-8')
    browser.open(tmp_path / 'changed.html')
    assert browser.complaints() and browser.ask('document.title') == '9 runs compared'


@pytest.mark.parametrize('theme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1200, 360])
@pytest.mark.parametrize('scripts', [True, False])
def test_nothing_goes_wrong_and_nothing_sticks_out(browser, page, theme, width, scripts):
  browser.open(page, width, theme=theme, scripts=scripts)
  assert browser.complaints() == []
  assert browser.ask('document.documentElement.scrollWidth') <= width
  background = re.findall(r'[\d.]+', browser.ask('getComputedStyle(document.body).backgroundColor'))
  assert (max(map(float, background[:3])) < 90) == (theme == 'dark')


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_the_theme_is_swapped(browser, page, theme):
  browser.open(page, theme=theme)
  colour = 'getComputedStyle(document.body).backgroundColor'
  before = browser.ask(colour)
  browser.ask("document.querySelector('#swap').click()")
  assert browser.ask(colour) != before


SECOND = "[...document.querySelector('#verdict table').tBodies[0].rows].map(row => +row.cells[1].dataset.v)"


def test_a_table_is_sorted_by_mouse_and_keyboard(browser, page):
  browser.open(page)
  means = [sum(values) / 3 for values in NAMES.values()]
  assert browser.ask(SECOND) == pytest.approx(means)
  head = "document.querySelectorAll('#verdict thead th')[1]"
  browser.ask(f'{head}.click()')
  assert browser.ask(SECOND) == pytest.approx(sorted(means))
  assert browser.ask(f"{head}.getAttribute('aria-sort')") == 'ascending'
  browser.ask(f'{head}.focus()')
  browser.key('Enter')
  assert browser.ask(SECOND) == pytest.approx(sorted(means, reverse=True))
  assert browser.ask(f"{head}.getAttribute('aria-sort')") == 'descending'


def test_what_is_missing_is_last_either_way(browser, page):
  browser.open(page)
  heads = "[...document.querySelectorAll('#evaluation thead th')]"
  head = f"{heads}.find(head => head.textContent.startsWith('kid'))"
  cells = ("(at => [...document.querySelector('#evaluation table').tBodies[0].rows].map(row => row.cells[at].dataset.v"
           f" ? +row.cells[at].dataset.v : null))({heads}.indexOf({head}))")
  found = sorted(value for values in NAMES.values() for value in values[1:])
  for wanted in found, found[::-1]:
    browser.ask(f'{head}.click()')
    assert browser.ask(cells) == wanted + [None] * (18 - len(found))


SHOWN = "[...document.querySelectorAll('.flip .one')].map((one, i) => one.offsetWidth ? i : -1).filter(i => i >= 0)"


def test_samples_are_flipped_through(browser, page):
  browser.open(page, scripts=False)
  browser.call('Emulation.setScriptExecutionDisabled', value=False)
  assert len(browser.ask(SHOWN)) == 9  # without the script all of them are there
  browser.open(page)
  assert browser.ask(SHOWN) == [0, 1]
  browser.ask("document.querySelectorAll('.controls button')[1].click()")
  assert browser.ask(SHOWN) == [0, 2]
  browser.ask("document.querySelector('.flip').focus()")
  for key in ('ArrowRight', 'ArrowLeft', 'ArrowLeft', 'ArrowLeft', 'ArrowLeft'):
    browser.key(key)
  assert browser.ask(SHOWN) == [0, 8]  # the first run beside itself is one picture, and before it comes the last


def test_the_slider_moves_every_strip(browser, page):
  browser.open(page)
  offset = ("[...document.querySelectorAll('.strip img')].map(image => image.parentNode.getBoundingClientRect().%s"
            ' - image.getBoundingClientRect().%s)')
  width = browser.ask("document.querySelector('.strip img').getBoundingClientRect().width")
  step = 36 * width / (5 * 36 - 4)
  assert browser.ask(offset % ('top', 'top')) == pytest.approx([0, 2 * step] * 9, abs=1)  # two images of two rows each
  offset %= 'left', 'left'
  assert browser.ask(offset) == pytest.approx([4 * step] * 18, abs=1)
  browser.ask("document.querySelector('input[type=range]').focus()")
  for level in (3, 2, 1, 0, 0):
    browser.key('ArrowLeft')
    assert browser.ask(offset) == pytest.approx([level * step] * 18, abs=1)


def test_a_legend_dims_all_curves_but_its_own(browser, page):
  browser.open(page)
  dim = ("[...document.querySelectorAll('#schedule .card:last-child g')].map(g => +getComputedStyle(g).opacity)")
  browser.ask("document.head.append(Object.assign(document.createElement('style'), {textContent: '* {transition: none "
              "!important}'}))")
  assert browser.ask(dim) == [1, 1, 1]
  browser.ask("document.querySelectorAll('#schedule .card:last-child .legend li')[1].focus()")
  browser.key('Enter')
  assert [opacity < 1 for opacity in browser.ask(dim)] == [True, False, True]
  browser.key('Enter')
  assert browser.ask(dim) == [1, 1, 1]


def test_a_number_leads_to_its_record(browser, page):
  browser.open(page)
  browser.ask("document.querySelector('#verdict td a').click()")
  found = browser.ask("(target => [target.textContent, target.getBoundingClientRect().height])"
                      "(document.querySelector(':target'))")
  assert '"value": 8.0' in found[0] and found[1] > 0
