# ruff: noqa: RUF001 - signs that look like others are what is tested
"""CLIP's tokenizer: words and tokens worked out by hand, laws over odd texts, and the files it reads and writes."""
import collections
import itertools
import json
import unicodedata

import numpy as np
import pytest

from diffusion_jax.convert import tokenizer
from diffusion_jax.runtime.config import UserError

CORPUS = ('the cat sat on the mat; the hat that the cat had. it is the newest, widest and lowest of them. '
          'a photo of an astronaut riding a horse, 4k, highly detailed. on était à la fête.')
END = '</w>'
NASTY = [
    '', ' ', '\t\n', 'a photo of a cat', '  A   Photo\tof\n\na CAT  ', 'tab\tseparated\vvertical\fform\rreturn', '!',
    "it's we're I'd they'll you've I'm don't 'tis ''s", '"\'s" .\'s a\'s 1\'s', '―—–‐ «»“”‘’ \u2019s it\u2019s',
    'hello, world!!! (really?) -- yes... #1 @you $5 50% a_b c/d e\\f', 'wow! !! a!b', 'the </w> mark',
    'numbers 1234 4k x2 3.14 ½ ² Ⅷ ٣ १२', 'ｆｕｌｌ ｗｉｄｔｈ １２', 'µ K \u2126 ª º ʰ ˀ', '\U0001d400\U000e0041',
    'café CAFÉ cafe\u0301 naïve Ångström ÅNGSTRÖM \u212b', 'ŉ ΐ ß ẞ ſ', 'e\u0301\u0323',
    'Ελλάς ΟΔΟΣ İstanbul ISTANBUL ǅ ﬁre straße STRASSE', '𐐀𐐨 الْعَرَبِيَّة',
    '你好世界 こんにちは 안녕하세요 สวัสดี नमस्ते مرحبا שלום', '\u1100\u1161\u11a8',
    '😀 👩\u200d👩\u200d👧 🇫🇷 ✨magic✨ ❤\ufe0f', 'a\u00a0b\u3000c\u2028d\u200be\ufefff\x85g\u180eh',
    '\x00\x01 a\x1cb\x1fc \x7f', '<|startoftext|> in <|endoftext|>the middle <|end',
    'x' * 300, 'the cat ' * 60,
]


def learned(merges=120):
  """(vocabulary, merges) by byte-pair encoding of CORPUS: again and again the most frequent pair becomes a token."""
  words = collections.Counter(CORPUS.replace(',', ' ,').replace('.', ' .').replace(';', ' ;').split())
  split = {word: [tokenizer.ALPHABET[b] for b in word.encode()] for word in words}
  for parts in split.values():
    parts[-1] += END
  found = []
  for _ in range(merges):
    pairs = collections.Counter()
    for word, parts in split.items():
      for pair in itertools.pairwise(parts):
        pairs[pair] += words[word]
    if not pairs:
      break
    best = max(pairs, key=lambda pair: (pairs[pair], pair))
    found.append(best)
    for word, parts in split.items():
      i = 0
      while i < len(parts) - 1:
        if (parts[i], parts[i + 1]) == best:
          parts[i:i + 2] = [''.join(best)]
        i += 1
      split[word] = parts
  # As in CLIP's own: the bytes in the order of their characters, the same at the end of a word, then the merges.
  letters = sorted(tokenizer.ALPHABET)
  tokens = [*letters, *(c + END for c in letters), *map(''.join, found), '<|startoftext|>', '<|endoftext|>']
  return {token: i for i, token in enumerate(tokens)}, found


VOCABULARY, MERGES = learned()
START, STOP = VOCABULARY['<|startoftext|>'], VOCABULARY['<|endoftext|>']
FLAGS = {'lstrip': False, 'rstrip': False, 'single_word': False}


def token(text, normalized=True, **more):
  return {'content': text, **FLAGS, 'normalized': normalized, **more}


NAMED = {'bos_token': token('<|startoftext|>'), 'eos_token': token('<|endoftext|>'), 'pad_token': '<|endoftext|>',
         'unk_token': token('<|endoftext|>')}
SD1 = {'tokenizer_class': 'CLIPTokenizer', 'model_max_length': 77,
       **{k: v if isinstance(v, str) else {'__type': 'AddedToken', **v} for k, v in NAMED.items()}}
LISTED = {'0': token('!', False, special=True), str(START): token('<|startoftext|>', special=True),
          str(STOP): token('<|endoftext|>', special=True)}


def folder_of(path, config=None, **files):
  """A folder with the vocabulary, and `files` {'special_tokens_map': object, ...}; None: without the file."""
  merges = '#version: 0.2\n' + ''.join(f'{a} {b}\n' for a, b in MERGES)
  files = {'vocab': VOCABULARY, 'tokenizer_config': SD1 if config is None else config, **files}
  for name, value in files.items():
    if value is not None:
      (path / f'{name}.json').write_text(json.dumps(value, ensure_ascii=False), 'utf-8')
  (path / 'merges.txt').write_text(merges, 'utf-8')
  return path


def whole_file():
  """The vocabulary as one tokenizer.json."""
  return {'version': '1.0', 'added_tokens': [{'id': i, **token(text, special=True)}
                                             for text, i in (('<|startoftext|>', START), ('<|endoftext|>', STOP))],
          'model': {'type': 'BPE', 'end_of_word_suffix': END, 'vocab': VOCABULARY, 'merges': [*map(list, MERGES)]}}


FOLDERS = {
    'sd1': {}, 'sd2': {'special_tokens_map': {**NAMED, 'pad_token': '!'}},
    'sdxl': {'config': {**SD1, 'pad_token': '!', 'added_tokens_decoder': LISTED}},
    'learned word': {'special_tokens_map': NAMED, 'added_tokens': {'<Cat-Toy>': STOP + 1}},
}


@pytest.fixture
def clip(tmp_path):
  return tokenizer.read(folder_of(tmp_path))


@pytest.mark.parametrize(('text', 'expected'), [
    ("It's 2025: we'll see!", ['it', "'s", '2', '0', '2', '5', ':', 'we', "'ll", 'see', '!']),
    ('  Two\tWORDS\n', ['two', 'words']), ('', []), ('a.b,c--d', ['a', '.', 'b', ',', 'c', '--', 'd']),
    ("x''s y's \"'s", ['x', "''", 's', 'y', "'s", '"\'', 's']), ('a_b', ['a', '_', 'b']),
    ('CAFE\u0301 caf\u00c9', ['caf\u00e9', 'caf\u00e9']), ('½²Ⅷ٣', ['½', '²', 'ⅷ', '٣']), ('ΟΔΟΣ', ['οδοσ']),
    ('你好，世界', ['你好', '，', '世界']), ('ok😀👍ok', ['ok', '😀👍', 'ok']), ('a\u3000b\u00a0c\x85d', list('abcd')),
    ('a\x1cb', ['a', '\x1c', 'b']), ('don\u2019t', ['don', '\u2019', 't'])])
def test_words(text, expected):
  """With nothing joined, a word is its bytes, the last of them with the mark of an end."""
  plain = tokenizer.Tokenizer({t: i for t, i in VOCABULARY.items() if i < 512}, {}, -1, -2, -3, -4, {})
  ids = plain.encode(text)
  ends = [i + 1 for i, k in enumerate(ids) if k >= 256]
  found = [plain.decode(ids[a:b]) for a, b in itertools.pairwise([0, *ends])]
  assert found == expected and len(ids) == sum(len(word.encode()) for word in expected)


def test_tokens_worked_out_by_hand():
  """Sennrich et al. 2016, figure 1: of low, lowest, newer, wider the merges r-end, l-o, lo-w, e-r-end, and 'lower'."""
  merges = [('r', 'l'), ('e', 'r' + END), ('l', 'o'), ('lo', 'w')]
  tokens = ['l', 'o', 'w', 'e', 'r', 'r' + END, 'rl', 'er' + END, 'lo', 'low', 'w' + END]
  ids = {t: i for i, t in enumerate(tokens)}
  small = tokenizer.Tokenizer(ids, {m: i for i, m in enumerate(merges)}, 90, 91, 92, 93, {})
  assert small.encode('lower') == [ids['low'], ids['er' + END]]
  # The end of a word is part of its last letter: 'low' alone ends in another w, and is not the 'low' of 'lower'.
  assert small.encode('low Lower') == [ids['lo'], ids['w' + END], ids['low'], ids['er' + END]]
  assert small.encode('r') == [ids['r' + END]] and small.encode('x') == [92]
  np.testing.assert_array_equal(small(['r', 'lower lower'], 5), [[90, 5, 91, 93, 93], [90, 9, 7, 9, 91]])


def test_bytes_stand_where_clips_vocabulary_has_them():
  """There '!' is 0, 'a' 64, '~' 93, and 256 more each at the end of a word; a space is the letter Ġ (U+0120)."""
  assert [VOCABULARY[t] for t in ('!', 'a', '~', '!' + END, 'a' + END)] == [0, 64, 93, 256, 320]
  assert tokenizer.ALPHABET[ord(' ')] == '\u0120' and len(set(tokenizer.ALPHABET)) == 256


def test_the_most_frequent_words_are_one_token(clip):
  assert clip.encode('the') == [VOCABULARY['the' + END]]
  assert len(clip.encode('the cat the cat')) == 4
  assert clip.encode('The  CAT\n') == clip.encode('the cat') and clip.encode('thecat') != clip.encode('the cat')


@pytest.mark.parametrize('text', NASTY, ids=range(len(NASTY)))
def test_every_text_comes_back(clip, text):
  """Without white space, in lower case and composed; and the text that comes back has the same tokens."""
  bare = ''.join(c for c in unicodedata.normalize('NFC', text) if not c.isspace() or '\x1c' <= c <= '\x1f')
  if '<|endoftext|>' not in text.lower():
    again = clip.decode(clip.encode(text))
    assert again.replace(' ', '') == ''.join(map(str.lower, bare))
    assert ''.join(clip.decode([i]) for i in clip.encode(again) if i) == \
        ''.join(clip.decode([i]) for i in clip.encode(text) if i)
  for length in (2, 8, 77):
    row, = clip([text], length)
    count = min(len(clip.encode(text)), length - 2)
    np.testing.assert_array_equal(row, [START, *clip.encode(text)[:count], *[STOP] * (length - 1 - count)])


def test_a_row_does_not_depend_on_the_others(clip):
  together = clip(NASTY)
  assert together.shape == (len(NASTY), 77) and together.dtype == np.int32
  np.testing.assert_array_equal(together, np.concatenate([clip([text]) for text in NASTY]))


@pytest.mark.parametrize(('name', 'pad', 'ids'), [
    ('sd1', STOP, [256]), ('sd2', 0, [0]), ('sdxl', 0, [0]), ('learned word', STOP, [256])])
def test_padding_is_the_folders(tmp_path, name, pad, ids):
  """SD 2 and SDXL pad with '!', which then is that token in prompts too, and not the one that ends a word."""
  found = tokenizer.read(folder_of(tmp_path, **FOLDERS[name]))
  np.testing.assert_array_equal(found(['!'], 5), [[START, *ids, STOP, pad, pad]])


def test_added_words_are_one_token(tmp_path):
  found = tokenizer.read(folder_of(tmp_path, **FOLDERS['learned word']))
  assert found.encode('the<cat-toy>s') == [*found.encode('the'), STOP + 1, *found.encode('s')]
  assert found.encode('<|EndOfText|>') == [STOP]


def test_one_file_says_the_same(tmp_path, clip):
  (tmp_path / 'one').mkdir()
  (tmp_path / 'one' / 'tokenizer.json').write_text(json.dumps(whole_file()), 'utf-8')
  one = tokenizer.read(tmp_path / 'one')
  np.testing.assert_array_equal(one(NASTY), clip(NASTY))


def test_what_is_written_is_what_was_read(tmp_path, clip):
  (tmp_path / 'README.md').write_text('not of the tokenizer')
  clip.write(tmp_path / 'copy' / 'tokenizer')
  copied = {path.name: path.read_bytes() for path in (tmp_path / 'copy' / 'tokenizer').iterdir()}
  assert copied == {name: (tmp_path / name).read_bytes() for name in ('vocab.json', 'merges.txt',
                                                                      'tokenizer_config.json')}
  np.testing.assert_array_equal(tokenizer.read(tmp_path / 'copy' / 'tokenizer')(NASTY), clip(NASTY))


@pytest.mark.parametrize(('files', 'message'), [
    ({'merges.txt': None}, 'has no merges.txt, and no tokenizer.json: give the folder'),
    ({'merges.txt': None, 'vocab.json': None}, 'has no vocab.json and no merges.txt, and no tokenizer.json'),
    ({'vocab.json': b'{"a": 1'}, 'vocab.json is damaged: '), ({'vocab.json': b'[1]'}, 'must hold an object, got list'),
    ({'vocab.json': b'{}'}, 'is no vocabulary'), ({'vocab.json': b'{"a": 1.5}'}, 'is no vocabulary'),
    ({'merges.txt': b'#version: 0.2\nt h\nq zz\n'}, "merge 2 joins 'q' and 'zz', but 'zz' is not in the vocabulary"),
    ({'merges.txt': b't h e\n'}, "merge 1 must name two tokens, got 't h e'"),
    ({'merges.txt': b'\xff\xfe'}, 'merges.txt cannot be read'),
    ({'tokenizer_config.json': b'{"tokenizer_class": "T5Tokenizer"}'}, "of class 'T5Tokenizer'; only CLIP's"),
    ({'tokenizer_config.json': b'{"pad_token": "<pad>"}'}, "the pad_token '<pad>' is not in the vocabulary"),
    ({'tokenizer_config.json': b'{"pad_token": 3}'}, 'the special tokens cannot be read'),
    ({'tokenizer_config.json': b'{"added_tokens_decoder": {"x": {}}}'}, 'the special tokens cannot be read'),
    ({'tokenizer_config.json': b'{"added_tokens_decoder": {"0": {"content": "!", "single_word": true}}}'},
     "'!' is to be found as a whole word only"),
    ({'added_tokens.json': b'{"<toy>": "7"}'}, "'<toy>' is not text with a number"),
    ({'merges.txt': None, 'tokenizer.json': b'{"model": {"type": "WordPiece"}}'}, "must be BPE .* got 'WordPiece'"),
    ({'merges.txt': None, 'tokenizer.json': b'{"model": {"type": "BPE", "end_of_word_suffix": "</w>"}}'}, 'lacks the')])
def test_damaged_folders_are_refused_in_a_sentence(tmp_path, files, message):
  folder_of(tmp_path)
  for name, data in files.items():
    if data is None:
      (tmp_path / name).unlink()
    else:
      (tmp_path / name).write_bytes(data)
  with pytest.raises(UserError, match=message) as error:
    tokenizer.read(tmp_path)
  assert '\n' not in str(error.value)


def test_what_is_no_prompt_is_refused(clip):
  with pytest.raises(UserError, match='at least 2 tokens, for start and end, got a length of 1'):
    clip(['a'], 1)
  with pytest.raises(UserError, match='is no text'):
    clip(['a\ud800'])
  with pytest.raises(UserError, match="must be a list of texts, got the text 'a cat'"):
    clip('a cat')


@pytest.mark.parametrize('name', FOLDERS)
def test_transformers_has_the_same_tokens(tmp_path, name):
  """Its fast tokenizer, which from version 5 on is the only one."""
  module = pytest.importorskip('transformers', reason='transformers missing: install the parity extra')
  folder = folder_of(tmp_path, **FOLDERS[name])
  theirs = getattr(module, 'CLIPTokenizerFast', module.CLIPTokenizer).from_pretrained(folder, local_files_only=True)
  texts = [*NASTY, 'a <cat-toy> on<Cat-Toy>']
  rows = theirs(texts, padding='max_length', truncation=True, max_length=77)['input_ids']
  for text, row, wanted in zip(texts, tokenizer.read(folder)(texts), rows, strict=True):
    assert row.tolist() == wanted, text
