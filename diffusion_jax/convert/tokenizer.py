"""CLIP's tokenizer from the files of its folder: byte-pair encoding of lower-cased text, without any other package.

A text is cut into words: runs of letters, single digits, runs of other signs, and English contractions (Radford et al.
2021, section 2.4; their code). The UTF-8 bytes of a word, written as one printable character each, are joined by the
folder's list of merges, the earliest in the list first; `</w>` marks the end of a word.

Where transformers' slow and fast classes differ, this is the fast one, which is the paper's: the slow one (before
version 5) makes each Chinese character a word and drops what is invisible, such as the joiners within emoji.
"""
import functools
import itertools
import json
import math
import pathlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffusion_jax.runtime import log
from diffusion_jax.runtime.config import UserError

# All that a folder may have; what it has is read, and written again as it was.
FILES = ('vocab.json', 'merges.txt', 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json',
         'added_tokens.json')
SPECIAL = {'bos_token': '<|startoftext|>', 'eos_token': '<|endoftext|>', 'unk_token': '<|endoftext|>',
           'pad_token': '<|endoftext|>'}
END_OF_WORD = '</w>'
LENGTH = 77  # tokens of a prompt, if the folder does not say
# On a text in which other alphabets' letters, digits, spaces and signs are each one of ASCII's; see `_outline`.
WORD = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+",
                  re.ASCII)


def _alphabet() -> list[str]:
  """The character that stands for each byte: itself if it is visible in Latin-1, else the next one from 256 on."""
  visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
  hidden = iter(range(256, 512))
  return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]


ALPHABET = _alphabet()
BYTES = {character: byte for byte, character in enumerate(ALPHABET)}


@dataclass(frozen=True, eq=False)
class Tokenizer:
  """tokenizer(prompts) -> int32 [B, length]: start, the prompt's tokens, end, and padding; see `read`."""
  vocabulary: Mapping[str, int]
  ranks: Mapping[tuple[str, str], int]  # of merges: the lowest first
  start: int
  end: int
  unknown: int
  pad: int
  added: Mapping[str, tuple[int, bool]]  # texts that are one token wherever they stand: id, whether in any case
  length: int = LENGTH
  files: Mapping[str, bytes] = field(default_factory=dict, repr=False)

  def __call__(self, prompts: Sequence[str], length: int | None = None) -> np.ndarray:
    """int32 [B, length] of B prompts; one that is too long loses its end, but keeps the end token.

    length: at least 2; the folder's own if None. Raises UserError if it is less, for what is no text, and for a single
    text in the place of several.
    """
    length = self.length if length is None else length
    if isinstance(prompts, str):
      raise UserError(f'prompts must be a list of texts, got the text {prompts!r}')
    if length < 2:
      raise UserError(f'prompts need at least 2 tokens, for start and end, got a length of {length}')
    ids = np.full((len(prompts), length), self.pad, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
      tokens = [self.start, *self.encode(prompt)[:length - 2], self.end]
      row[:len(tokens)] = tokens
    return ids

  def encode(self, text: str) -> list[int]:
    """The tokens of a text, without start, end and padding."""
    return list(self._encode(text))

  def decode(self, ids: Sequence[int]) -> str:
    """The text of tokens, in lower case, with a space after each word; start, end and padding are left out."""
    left_out, text = {self.start, self.end, self.pad}, b''
    for i in map(int, ids):
      token = self._tokens.get(i, '')
      if i in left_out:
        continue
      word = token.removesuffix(END_OF_WORD)
      text += bytes(BYTES[c] for c in word) if set(word) <= set(BYTES) else token.encode()
      text += b' ' if token != word or token in self.added else b''
    return text.decode('utf-8', 'replace').strip(' ')

  def write(self, folder: pathlib.Path) -> None:
    """Writes the files that were read to another folder, each whole or not at all."""
    for name, data in self.files.items():
      log.write(folder / name, data)

  def _encode(self, text: str) -> Iterator[int]:
    try:
      text.encode()
    except UnicodeEncodeError:
      raise UserError(f'the prompt {text!r} is no text: it holds half a character') from None
    for part, token in _split(text, self._exact):
      if token is not None:
        yield token
        continue
      for piece, token in _split(_normal(part), self._in_any_case):
        yield from self._words(piece) if token is None else (token,)

  def _words(self, text: str) -> Iterator[int]:
    for match in WORD.finditer(_outline(text)):
      yield from self._merged(text[slice(*match.span())])

  @functools.cached_property
  def _merged(self):
    return functools.lru_cache(1 << 16)(self._merge)

  def _merge(self, word: str) -> tuple[int, ...]:
    """The tokens of one word."""
    parts = [ALPHABET[byte] for byte in word.encode()]
    parts[-1] += END_OF_WORD
    while len(parts) > 1:
      pair = min(itertools.pairwise(parts), key=lambda pair: self.ranks.get(pair, math.inf))
      if pair not in self.ranks:
        break
      joined, i = [], 0
      while i < len(parts):
        found = tuple(parts[i:i + 2]) == pair
        joined.append(''.join(pair) if found else parts[i])
        i += 1 + found
      parts = joined
    return tuple(self.vocabulary.get(part, self.unknown) for part in parts)

  @functools.cached_property
  def _tokens(self) -> dict[int, str]:
    return {i: token for token, i in self.vocabulary.items()} | {i: text for text, (i, _) in self.added.items()}

  @functools.cached_property
  def _exact(self) -> dict[str, int]:
    return {text: i for text, (i, any_case) in self.added.items() if not any_case}

  @functools.cached_property
  def _in_any_case(self) -> dict[str, int]:
    return {_normal(text): i for text, (i, any_case) in self.added.items() if any_case}


def _normal(text: str) -> str:
  """Composed characters (NFC), one space for white space, lower case."""
  composed = re.sub(' +', ' ', ''.join(map(_spaced, unicodedata.normalize('NFC', text))))
  return ''.join(map(str.lower, composed))  # one by one: in a whole text a sigma at the end of a word becomes another


def _spaced(c: str) -> str:
  """Unicode's white space as a space; the four separators \\x1c to \\x1f, which Python counts too, are signs here."""
  return ' ' if c.isspace() and not '\x1c' <= c <= '\x1f' else c


def _outline(text: str) -> str:
  """`text` with each character outside ASCII replaced by 'a' (letters), '0' (numbers), ' ' or '.' (all else)."""
  kinds = {'L': 'a', 'N': '0'}
  return ''.join(c if c.isascii() else kinds.get(unicodedata.category(c)[0], '.') for c in text)


def _split(text: str, tokens: Mapping[str, int]) -> Iterator[tuple[str, int | None]]:
  """(part, None) of what lies between tokens and (token, id) of each, the first and longest of them first."""
  if not tokens:
    yield text, None
    return
  longest = sorted(tokens, key=len, reverse=True)
  for part in re.split(f'({"|".join(map(re.escape, longest))})', text):
    if part:
      yield part, tokens.get(part)


def read(folder: pathlib.Path) -> Tokenizer:
  """The tokenizer of a folder: vocab.json and merges.txt or tokenizer.json, and what names its special tokens.

  Raises UserError for a folder without them, for damaged files, for another kind of tokenizer, and for merges or
  special tokens that the vocabulary does not have.
  """
  folder = pathlib.Path(folder)
  try:
    found = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
  except OSError as error:
    raise UserError(f'{folder} cannot be read: {error}') from None
  config, whole = _object(folder, found, 'tokenizer_config.json'), _object(folder, found, 'tokenizer.json')
  kind = config.get('tokenizer_class') or 'CLIPTokenizer'
  if not str(kind).startswith('CLIP'):
    raise UserError(f"{folder} has a tokenizer of class {kind!r}; only CLIP's can be read")
  vocabulary, merges, where = _model(folder, found, whole)
  if not vocabulary or not all(type(i) is int and i >= 0 for i in vocabulary.values()):
    raise UserError(f'{where} is no vocabulary: it must give each token a number')
  special, added = _special(folder, found, config, whole, vocabulary)
  ranks = {}
  for number, pair in enumerate(merges):
    if len(pair) != 2:
      raise UserError(f'{where}: merge {number + 1} must name two tokens, got {" ".join(pair)!r}')
    if unknown := [token for token in (*pair, ''.join(pair)) if token not in vocabulary]:
      raise UserError(f'{where}: merge {number + 1} joins {pair[0]!r} and {pair[1]!r}, but {unknown[0]!r} is not in '
                      f'the vocabulary: the merges are of another tokenizer')
    ranks.setdefault(pair, number)
  ids = vocabulary | {text: i for text, (i, _) in added.items()}
  length = config.get('model_max_length')
  sensible = isinstance(length, (int, float)) and 2 <= length <= 100_000  # "no limit" is written as 1e30
  return Tokenizer(vocabulary, ranks, *(ids[special[name]] for name in SPECIAL), added,
                   int(length) if sensible else LENGTH, found)


def _model(folder: pathlib.Path, found: Mapping[str, bytes], whole: Mapping[str, Any]) -> tuple[dict, list, str]:
  """The vocabulary, the merges as pairs, and the file of the latter."""
  if 'vocab.json' in found and 'merges.txt' in found:
    where = folder / 'merges.txt'
    try:
      lines = found['merges.txt'].decode().split('\n')
    except UnicodeDecodeError as error:
      raise UserError(f'{where} cannot be read: {error}') from None
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith('#version')]
    return _object(folder, found, 'vocab.json'), merges, str(where)
  if 'tokenizer.json' not in found:
    missing = [name for name in ('vocab.json', 'merges.txt') if name not in found]
    raise UserError(f"{folder} has no {' and no '.join(missing)}, and no tokenizer.json: give the folder of CLIP's "
                    f'tokenizer, such as the one called tokenizer in a pipeline')
  where, model = str(folder / 'tokenizer.json'), whole.get('model')
  model = model if isinstance(model, dict) else {}
  if model.get('type', 'BPE') != 'BPE' or model.get('end_of_word_suffix') != END_OF_WORD:
    raise UserError(f"{where} is not CLIP's: its model must be BPE whose words end with {END_OF_WORD!r}, got "
                    f'{model.get("type")!r} and {model.get("end_of_word_suffix")!r}')
  vocabulary, merges = model.get('vocab'), model.get('merges')
  if not isinstance(vocabulary, dict) or not isinstance(merges, list):
    raise UserError(f'{where} lacks the vocabulary or the merges of its model')
  return vocabulary, [tuple(m.split() if isinstance(m, str) else map(str, m)) for m in merges], where


def _special(folder: pathlib.Path, found: Mapping[str, bytes], config: Mapping[str, Any], whole: Mapping[str, Any],
             vocabulary: Mapping[str, int]) -> tuple[dict[str, str], dict[str, tuple[int, bool]]]:
  """{'bos_token': its text, ...} and the texts that are one token wherever they stand, as in Tokenizer.added."""
  listed = config.get('added_tokens_decoder')
  named = {**SPECIAL, **{k: v for k, v in config.items() if k in SPECIAL and v}}
  added = {}
  try:
    if listed is not None:  # newer folders say all here
      described = {int(i): token for i, token in listed.items()}
    else:
      named |= {k: v for k, v in _object(folder, found, 'special_tokens_map.json').items() if k in SPECIAL and v}
      described = {i: {'content': text, 'normalized': True}
                   for text, i in _object(folder, found, 'added_tokens.json').items()}
      described |= {token['id']: token for token in whole.get('added_tokens') or ()}
    for i, token in described.items():
      added[token['content']] = i, _in_any_case(token)
    for name, token in named.items():
      named[name] = text = token if isinstance(token, str) else token['content']
      if text not in added:
        if text not in vocabulary:
          raise UserError(f'{folder}: the {name} {text!r} is not in the vocabulary')
        added[text] = vocabulary[text], _in_any_case(token)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise UserError(f'{folder}: the special tokens cannot be read: {error!r}') from None
  if odd := [text for text, (i, _) in added.items() if type(text) is not str or type(i) is not int or not text]:
    raise UserError(f'{folder}: the special tokens cannot be read: {odd[0]!r} is not text with a number')
  return named, added


def _in_any_case(token: Any) -> bool:
  """Whether a special token is also found in capitals; how it takes the white space around it changes no word."""
  if isinstance(token, str):
    return False
  if token.get('single_word'):
    raise ValueError(f'{token["content"]!r} is to be found as a whole word only')
  return bool(token.get('normalized'))


def _object(folder: pathlib.Path, found: Mapping[str, bytes], name: str) -> dict[str, Any]:
  """The JSON object in a file; {} if there is none."""
  try:
    value = json.loads(found.get(name, b'{}').decode())
  except ValueError as error:
    raise UserError(f'{folder / name} is damaged: {error}') from None
  if not isinstance(value, dict):
    raise UserError(f'{folder / name} must hold an object, got {type(value).__name__}')
  return value
