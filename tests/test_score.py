"""From image files to values: encode and score, against torch-fidelity's numbers; what does not match is refused."""
import hashlib
import pathlib

import fidgen
import numpy as np
import pytest
from nets import jit
from PIL import Image

from diffusion_jax import encode, score
from diffusion_jax.data import sources
from diffusion_jax.metrics import features, frechet, inception, reference, scores, weights
from diffusion_jax.metrics.reference import Reference
from diffusion_jax.runtime import command, log

PEER = np.load(pathlib.Path(__file__).parent / 'fixtures' / 'inception_set.npz')  # torch-fidelity's, of six images


def pngs(folder, images):
  folder.mkdir(parents=True)
  for i, image in enumerate(images):
    Image.fromarray(image.squeeze()).save(folder / f'{i:06d}.png')
  return f'folder:{folder}'


def run(main, *flags):
  assert command.run(main, list(flags)) == 0


def test_files_through_inception_score_as_torch_fidelity_scores_them(tmp_path, monkeypatch):
  """PNG -> features -> FID and KID, where the peer's features and the definitions give the expected values.

  Two sets of four, which share two images: of four and more no root of a matrix of 2048 rows is taken.
  """
  # The program that test_inception.py compiles: the features are the same in any batch.
  monkeypatch.setattr(features, 'BATCH', 2)
  monkeypatch.setattr(inception, '_network', jit(inception._network.__wrapped__))
  images, file = fidgen.images(32, 6), tmp_path / 'inception.safetensors'
  file.write_bytes(inception.to_safetensors(inception.from_torch(fidgen.state_dict())))
  run(encode.main, f'--features=inception:{file}', f'--source={pngs(tmp_path / "real", images[2:])}',
      f'--out={tmp_path}/real.safetensors')
  run(score.main, f'--features=inception:{file}', f'--samples={pngs(tmp_path / "made", images[:4])}',
      f'--reference={tmp_path}/real.safetensors', f'--out={tmp_path}/out.jsonl', '--metrics=fd,kid,sfd')
  found = {record['metric']: record['value'] for record in log.read_lines(tmp_path / 'out.jsonl')}
  x, y = PEER['2048'][:4].astype(np.float64), PEER['2048'][2:].astype(np.float64)
  a, b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
  nuclear = np.linalg.norm(a @ b.T, 'nuc')
  fid = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.sum(a ** 2) + np.sum(b ** 2) - 2 * nuclear
  assert found['fid_4'] == pytest.approx(fid, rel=1e-4)
  kernel = lambda p, q: (p @ q.T / 2048 + 1) ** 3
  within = lambda p: kernel(p, p)[~np.eye(len(p), dtype=bool)].mean()
  assert found['kid_4'] == pytest.approx(within(x) + within(y) - 2 * kernel(x, y).mean(), rel=1e-2)  # near 1 each
  assert set(found) == {'fid_4', 'kid_4', 'sfid_4'}


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
  """The digits of both splits as files, and the reference of one of them."""
  root = tmp_path_factory.mktemp('digits')
  for split in ('train', 'test'):
    pngs(root / split, sources.load('digits', split).images[:200])
  run(encode.main, '--features=digits', f'--source=folder:{root}/train', '--channels=1',
      f'--out={root}/ref.safetensors')
  return root


def test_a_set_against_itself_is_no_distance_away_and_the_record_says_what_it_is(digits, capsys):
  out = digits / 'itself.jsonl'
  run(score.main, '--features=digits', f'--samples=folder:{digits}/train', f'--reference={digits}/ref.safetensors',
      f'--out={out}', '--metrics=fd,neighbours')
  records = {record['metric']: record for record in log.read_lines(out)}
  assert abs(records['fd_digits_200']['value']) < 1e-4  # roots of a singular covariance lose half the digits
  assert records['precision_digits_200']['value'] == records['recall_digits_200']['value'] == 1
  record, ref = records['fd_digits_200'], reference.load(digits / 'ref.safetensors')
  assert record['features_hash'] == ref.about['features_hash'] == features.make('digits').digest
  images, labels = sources.arrays(sources.load(f'folder:{digits}/train', channels=1))
  assert record['reference_hash'] == ref.about['reference_hash'] == sources.digest(images, labels)
  assert record['reference_samples'] == record['num_samples'] == 200


def test_a_reference_is_made_once(digits, monkeypatch):
  extractor = features.make('digits')
  source = sources.load(f'folder:{digits}/test', channels=1)
  first = encode.encode(source, extractor, 10)
  blind = extractor._replace(extract=lambda images: pytest.fail('made again'))
  again = encode.encode(source, blind, 10)
  np.testing.assert_array_equal(first.features, again.features)
  np.testing.assert_array_equal(first.moments['features'].cov, again.moments['features'].cov)
  path, = (weights.cache() / 'references').glob(f'{first.about["reference_hash"][:16]}-digits-*')
  path.write_bytes(path.read_bytes()[:1000])  # damaged: made again, not trusted
  np.testing.assert_array_equal(encode.encode(source, extractor, 10).features, first.features)


def test_a_reference_is_the_same_read_in_pieces(monkeypatch):
  source, extractor = sources.load('synthetic:8x8x1:70', 'test'), features.make('digits')
  whole = frechet.moments(extractor.extract(sources.arrays(source)[0])['features'])
  pieces = sources.batches
  monkeypatch.setattr(sources, 'batches', lambda source, max_bad: pieces(source, max_bad, 32))
  monkeypatch.setattr(encode, 'KEPT', 20)
  found = encode.encode(source, extractor, 10)
  assert found.moments['features'].n == 70 and found.features.shape == (20, 64)
  np.testing.assert_allclose(found.moments['features'].cov, whole.cov, atol=1e-5)
  assert found.about['reference_hash'] == sources.digest(*sources.arrays(source))


def test_bad_records_are_left_out_of_the_hash(tmp_path):
  source = pngs(tmp_path / 'set', sources.load('digits', 'train').images[:6])
  good = sources.digest(*sources.arrays(sources.load(source, channels=1)))
  (tmp_path / 'set' / '000002b.png').write_bytes(b'no picture')
  with pytest.warns(UserWarning, match='bad records'):
    assert encode.identify(sources.load(source, channels=1), 10) == (good, 6)


def test_published_moments_serve_as_a_reference(digits, tmp_path):
  """The .npz of others: mu and sigma. What needs features is left out, and refused if it is asked for."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(300, 8))
  np.savez(tmp_path / 'stats.npz', mu=x.mean(0), sigma=np.cov(x, rowvar=False))
  ref = reference.load(tmp_path / 'stats.npz')
  assert ref.features is None and ref.about['features'] == 'inception'
  found = {'features': x.astype(np.float32), 'logits': rng.normal(size=(300, 4))}
  kinds = scores.available(scores.DEFAULTS['inception'], 'inception', found, ref, None)
  assert kinds == ['fd', 'is']
  assert abs(scores.scores('inception', found, ref, None, ['fd'])[0].value) < 1e-5
  with pytest.raises(ValueError, match="'kid' needs the reference's features"):
    scores.scores('inception', found, ref, None, ['kid'])


def test_a_reference_survives_its_file_and_damage_is_seen(tmp_path):
  x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
  ref = Reference({'features': 'digits', 'features_hash': 'a', 'reference': 'x/y'}, {'features': frechet.moments(x)}, x)
  path = tmp_path / 'ref.safetensors'
  path.write_bytes(whole := reference.to_bytes(ref))
  again = reference.load(path)
  assert again.about == ref.about and again.moments['features'].n == 50
  np.testing.assert_array_equal(again.features, x)
  np.testing.assert_array_equal(again.moments['features'].cov, ref.moments['features'].cov)
  for bad in (b'', whole[:100], whole[:-7], b'\xff' * 200, whole.replace(b'counts', b'counds')):
    path.write_bytes(bad)
    with pytest.raises(ValueError, match='holds no reference'):
      reference.load(path)
  for arrays in ({'mu': np.zeros(2)}, {'mu': np.zeros(2), 'sigma': np.zeros((3, 3))},
                 {'mu': np.full(2, np.nan), 'sigma': np.eye(2)},
                 {'mu': np.asarray([print, print]), 'sigma': np.eye(2)}):  # pickled, which must not be read
    np.savez(tmp_path / 'bad.npz', **arrays)
    with pytest.raises(ValueError, match='holds no reference'):
      reference.load(tmp_path / 'bad.npz')
  with pytest.raises(FileNotFoundError, match='diffusion-jax encode'):
    reference.load(tmp_path / 'none.safetensors')


@pytest.mark.parametrize(('kind', 'extractor', 'samples', 'name'), [
    ('fd', 'inception', 50_000, 'fid'), ('fd', 'inception', 5_000, 'fid_5k'), ('sfd', 'inception', 10_000, 'sfid_10k'),
    ('is', 'inception', 50_000, 'is'), ('fd', 'digits', 500, 'fd_digits_500'), ('fd', 'dinov2', 50_000, 'fd_dinov2'),
    ('fd_infinity', 'inception', 12_345, 'fid_infinity_12345'), ('precision', 'inception', 10_000, 'precision_10k')])
def test_names_carry_the_number_of_samples(kind, extractor, samples, name):
  assert scores.named(kind, extractor, samples) == name


def test_every_kind_has_a_value_within_its_interval():
  rng = np.random.default_rng(0)
  real, made = rng.normal(size=(600, 4)), rng.normal(0.2, 1, (400, 4))
  ref = Reference({}, {'features': frechet.moments(real), 'sfid': frechet.moments(real)}, real)
  found = {'features': made, 'sfid': made, 'logits': rng.normal(size=(400, 5))}
  labels = rng.integers(0, 5, 400)
  for extractor in ('inception', 'digits'):
    kinds = scores.available(scores.KINDS, extractor, found, ref, labels)
    assert set(scores.KINDS) - set(kinds) == ({'accuracy'} if extractor == 'inception' else {'is'})
    for made_score in scores.scores(extractor, found, ref, labels, kinds):
      assert made_score.metric.endswith('_400')
      assert made_score.ci[0] <= made_score.value <= made_score.ci[1], made_score


@pytest.mark.parametrize(('flags', 'words'), [
    (['--features=digit'], "no features 'digit'; did you mean 'digits'?"),
    (['--features=digits:weights.pth'], 'need no file of weights'),
    (['--features=dinov2'], 'write dinov2:FILE'),
    (['--features=inception:nowhere.pth'], 'there is no weight file nowhere.pth'),
    (['--features=pixels'], 'holds features digits, and --features asks for pixels'),
    (['--metrics=fid'], "no metric 'fid'; did you mean 'fd'?"),
    (['--metrics=is'], "'is' needs Inception's logits"),
    (['--samples=folder:/nowhere'], 'There is no folder'),
    (['--samples=synthetic:9x9x1:8'], 'shape [9, 9, 1] and the images of the reference [8, 8, 1]'),
    (['--num=201'], '--num must lie from 2 to the 200 images'),
    (['--reference=/nowhere.safetensors'], 'there is no reference /nowhere.safetensors'),
    (['--config.seed=1'], 'score takes no config'),
])
def test_bad_flags_of_score_get_one_sentence(digits, capsys, flags, words):
  given = [f'--samples=folder:{digits}/test', f'--reference={digits}/ref.safetensors', '--features=digits']
  assert command.run(score.main, [*given, *flags]) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1 and words in error


def test_other_weights_are_refused(digits, tmp_path, capsys):
  ref = reference.load(digits / 'ref.safetensors')
  path = tmp_path / 'ref.safetensors'
  path.write_bytes(reference.to_bytes(ref._replace(about={**ref.about, 'features_hash': 'b' * 64})))
  flags = [f'--samples=folder:{digits}/test', f'--reference={path}', '--features=digits']
  assert command.run(score.main, flags) == 2
  assert 'made with the weights bbbbbbbbbbbb of digits, and these are' in capsys.readouterr().err


@pytest.mark.parametrize(('flags', 'words'), [
    (['--source=digits', '--workdir=/x'], 'give either --workdir'),
    (['--features=digits'], 'give either --workdir'),
    (['--source=digits', '--split=val'], "no split 'val'"),
    (['--source=digits', '--out=ref.npz'], "must be a .safetensors file, got 'ref.npz'"),
    (['--source=synthetic:9x9x1:8'], 'takes images of shape (8, 8, 1)'),
])
def test_bad_flags_of_encode_get_one_sentence(capsys, flags, words):
  assert command.run(encode.main, ['--features=digits', *flags]) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1 and words in error


def test_missing_inception_weights_say_what_to_do(monkeypatch, tmp_path, capsys):
  monkeypatch.setenv('DIFFUSION_JAX_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setattr(weights, 'FID_INCEPTION', weights.FID_INCEPTION._replace(url=f'file://{tmp_path}/none.pth'))
  assert command.run(encode.main, ['--features=inception', '--source=digits']) == 2
  error = capsys.readouterr().err
  for part in (str(tmp_path / 'cache'), 'none.pth', 'inception:FILE', 'digits, cifar or pixels'):
    assert part in error
  assert error.count('\n') == 1


def test_weights_are_fetched_and_converted_once(monkeypatch, tmp_path):
  """A known file appears in the cache, its parameters beside it; the second time neither is made again."""
  monkeypatch.setenv('DIFFUSION_JAX_CACHE', str(tmp_path / 'cache'))
  content = b'weights'
  (tmp_path / 'w.pth').write_bytes(content)
  known = weights.FID_INCEPTION._replace(url=f'file://{tmp_path}/w.pth', size=len(content),
                                         digest=hashlib.sha256(content).hexdigest())
  monkeypatch.setattr(weights, 'FID_INCEPTION', known)
  reads = []
  monkeypatch.setattr(weights, 'read', lambda path: reads.append(path) or fidgen.state_dict())
  first, second = features.make('inception'), features.make('inception')
  assert first.digest == second.digest and len(reads) == 1
  assert (tmp_path / 'cache' / known.names[0]).read_bytes() == content
  kept, = (tmp_path / 'cache').glob('inception-*.safetensors')
  kept.write_bytes(kept.read_bytes()[:1000])  # damaged: converted again
  assert features.make('inception').digest == first.digest and len(reads) == 2
