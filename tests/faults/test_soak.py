"""Thirty kills at random moments of one run, which then ends in the bits of a run that nobody disturbed."""
import random
import signal
import time

import runs

KILLS, SEED = 30, 0
CHANGES = {'train__images': 96_000, 'train__log_every': 320, 'train__checkpoint_every': 320,
           'train__sample_every': 96_000}


def test_thirty_kills_at_random_moments_change_no_bit(tmp_path):
  began = time.monotonic()
  process = runs.start(tmp_path / 'whole', **CHANGES)
  runs.wait_for(lambda: runs.records(tmp_path / 'whole'), process)
  start = time.monotonic() - began  # seconds from nothing to the first record
  code, _, err = runs.finish(process, 600)
  assert code == 0, err
  interval = (time.monotonic() - began - start) / 300
  workdir, rng, said = tmp_path / 'killed', random.Random(SEED), []
  for kill in range(KILLS):
    process, before = runs.start(workdir, **CHANGES), len(runs.records(workdir))
    if early := rng.random() < 0.5:
      time.sleep(rng.uniform(0, start))       # while it imports, compiles, restores
    else:
      runs.wait_for(lambda before=before: len(runs.records(workdir)) > before, process)
      time.sleep(rng.uniform(0, 4) * interval)  # while it trains and saves
    number = rng.choice([signal.SIGKILL, signal.SIGTERM])
    process.send_signal(number)
    code, _, err = runs.finish(process)
    # 75: told to stop, and saved; -15: before it could listen, when there was nothing to save yet.
    assert code in ((-signal.SIGKILL,) if number == signal.SIGKILL else (75, -signal.SIGTERM)), (code, err)
    said.append(f'kill {kill + 1:2}: {number.name} {"early" if early else "later"}, status {code}, step '
                f'{max((r["step"] for r in runs.records(workdir)), default=0)}')
    print(said[-1], flush=True)
  code, _, err = runs.finish(runs.start(workdir, **CHANGES), 600)
  assert code == 0, err
  assert runs.fingerprint(workdir) == runs.fingerprint(tmp_path / 'whole')
  assert {r['step'] for r in runs.records(workdir)} >= set(range(20, 6001, 20))
  assert runs.names(workdir) == ['5980', '6000'] and not (workdir / 'damaged').exists()
  print(f'{KILLS} kills: fingerprint {runs.fingerprint(workdir)[:12]}, that of the run that nobody disturbed')
