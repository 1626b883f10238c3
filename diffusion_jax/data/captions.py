"""Captions of a folder of images: FILE.txt beside FILE.png, or JSON lines in captions.jsonl or metadata.jsonl.

A line is {"file_name": "a.png", "text": "a red boat"}, the file name relative to the folder of the .jsonl file (the
form of Hugging Face's imagefolder); other keys are passed over, and so is a metadata.jsonl none of whose lines has a
text. White space within a caption is made single blanks.
"""
import json
import posixpath
from concurrent import futures

LISTS = ('captions.jsonl', 'metadata.jsonl')


def read(found, images, read_bytes):
  """The captions of images: {path: text}, empty where there are none.

  found: the paths of all files, with '/' between folders; images: those of the images; read_bytes: path -> content.
  Raises ValueError for a caption whose image is not there, for a second caption of an image, for lists and .txt files
  in one place, and for a line or a file that cannot be read.
  """
  images, stems = set(images), {posixpath.splitext(path)[0] for path in images}
  lists = sorted(path for path in found if posixpath.basename(path) in LISTS)
  listed = {}
  for path in lists:
    _read_list(path, _text(path, read_bytes), images, listed)
  texts = sorted(path for path in found if path.endswith('.txt'))
  beside = [path for path in texts if path[:-4] in stems]
  if listed and beside:
    raise ValueError(f'{lists[0]} and {beside[0]} both hold captions: keep the .jsonl or the .txt files.')
  if not beside:
    return listed
  folders = {posixpath.dirname(path) for path in images}
  for path in texts:
    if path[:-4] not in stems and posixpath.dirname(path) in folders:
      raise ValueError(f'{path} is the caption of no image, and {beside[0]} is of the image of the same name: add the '
                       'image, or remove the file.')
  with futures.ThreadPoolExecutor(16) as pool:  # each may be an object in a bucket
    captions = dict(pool.map(lambda path: (path[:-4], _clean(_text(path, read_bytes))), beside))
  named = ((path, posixpath.splitext(path)[0]) for path in images)
  return {path: captions[stem] for path, stem in named if stem in captions}


def _read_list(path, content, images, captions):
  """Adds the captions of a .jsonl file to {path: text}."""
  lines = [(f'{path}, line {i}', line) for i, line in enumerate(content.split('\n'), 1) if line.strip()]
  rows = [(where, _row(where, line)) for where, line in lines]
  if posixpath.basename(path) == 'metadata.jsonl' and not any('text' in row for _, row in rows):
    return
  for where, row in rows:
    for key in ('file_name', 'text'):
      if not isinstance(row.get(key), str):
        raise ValueError(f'{where}: {key} is {row.get(key)!r}, expected a string: write '
                         '{"file_name": "a.png", "text": "what it shows"}.')
    image = posixpath.normpath(posixpath.join(posixpath.dirname(path), row['file_name']))
    if image not in images:
      raise ValueError(f'{where}: there is no image {image}: add it, or remove the line.')
    if image in captions:
      raise ValueError(f'{where}: {image} has a caption already: keep one of them.')
    captions[image] = _clean(row['text'])


def _row(where, line):
  try:
    row = json.loads(line)
  except ValueError as error:
    raise ValueError(f'{where} is not JSON ({error}): write one object on each line.') from error
  if not isinstance(row, dict):
    raise ValueError(f'{where} is {line.strip()[:40]}, expected an object such as '
                     '{"file_name": "a.png", "text": "what it shows"}.')
  return row


def _text(path, read_bytes):
  try:
    return read_bytes(path).decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is not UTF-8 text ({error}): save it as UTF-8.') from error


def _clean(text):
  return ' '.join(text.split())
