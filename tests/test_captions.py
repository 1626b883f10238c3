"""Captions of folders and zip files: which become which class names, and what is said of those that cannot."""
import json
import re

import numpy as np
import pytest
from test_data_images import pixels, save, write_tree, write_zip

from diffusion_jax.data import sources

TEXTS = {'a.png': 'a red boat', 'b.png': 'a dog', 'c.PNG': 'a red boat', 'd.jpeg': 'Ein Häuschen'}


def write_lists(root, name, texts):
  """Writes captions as JSON lines into a file of that name below root; the paths are relative to its folder."""
  (root / name).parent.mkdir(parents=True, exist_ok=True)
  (root / name).write_text(''.join(json.dumps({'file_name': path, 'text': text}) + '\n'
                                   for path, text in texts.items()), 'utf-8')


def captioned(root, texts, form):
  """A folder of images with those captions, in one of the three forms."""
  write_tree(root, sorted(texts), height=16, width=16)
  if form != 'txt':
    write_lists(root, form, texts)
  for path, text in texts.items() if form == 'txt' else ():
    (root / path).with_suffix('.txt').write_text(text + '\n', 'utf-8')
  return root


def read(source):
  return [source.class_names[source[i][1]] for i in range(len(source))]


@pytest.mark.parametrize('kind', ['folder', 'zip'])
@pytest.mark.parametrize('form', ['captions.jsonl', 'metadata.jsonl', 'txt'])
def test_every_distinct_caption_is_a_class(form, kind, tmp_path):
  root = captioned(tmp_path / 'root', TEXTS, form)
  name = f'folder:{root}' if kind == 'folder' else f'zip:{write_zip(tmp_path / "root.zip", root)}'
  source = sources.load(name)
  assert source.class_names == ['Ein Häuschen', 'a dog', 'a red boat'] and len(source) == 4
  assert read(source) == list(TEXTS.values())
  np.testing.assert_array_equal(source[1][0], pixels(1, 16, 16))


@pytest.mark.parametrize('form', ['metadata.jsonl', 'txt'])
def test_folders_are_no_classes_beside_captions_and_may_be_mixed(form, tmp_path):
  texts = {'a.png': 'one', 'deep/c.png': 'two', 'deep/er/b.png': 'three'}
  assert read(sources.load(f'folder:{captioned(tmp_path, texts, form)}')) == ['one', 'two', 'three']


@pytest.mark.parametrize('within', [True, False])
def test_splits_share_the_numbers_of_captions_wherever_their_lists_lie(within, tmp_path):
  texts = {'train/a.png': 'one', 'train/sub/b.png': 'two', 'test/c.png': 'three', 'extra/d.png': 'four'}
  write_tree(tmp_path, texts)
  for split in ('train', 'test', 'extra') if within else ():
    own = {path.removeprefix(f'{split}/'): text for path, text in texts.items() if path.startswith(split)}
    write_lists(tmp_path, f'{split}/metadata.jsonl', own)
  if not within:
    write_lists(tmp_path, 'captions.jsonl', texts)
  train, test = sources.load(f'folder:{tmp_path}'), sources.load(f'folder:{tmp_path}', 'test')
  assert read(train) == ['one', 'two'] and read(test) == ['three']
  assert train.class_names == test.class_names == ['one', 'three', 'two']


def test_a_split_may_have_captions_beside_one_without(tmp_path):
  write_tree(tmp_path, ['train/a.png', 'test/ant/b.png', 'test/bee/c.png'])
  (tmp_path / 'train/a.txt').write_text('a caption')
  assert sources.load(f'folder:{tmp_path}').class_names == ['a caption']
  assert sources.load(f'folder:{tmp_path}', 'test').class_names == ['ant', 'bee']


def test_white_space_becomes_single_blanks_and_other_keys_and_blank_lines_are_passed_over(tmp_path):
  write_tree(tmp_path, ['a.png', 'b.png'])
  (tmp_path / 'captions.jsonl').write_text(
      '\ufeff{"file_name": "./a.png", "text": " two\\n lines ", "score": 3}\r\n\n{"text": "", "file_name": "b.png"}')
  assert read(sources.load(f'folder:{tmp_path}')) == ['two lines', '']


def test_a_list_of_anything_but_texts_holds_no_captions(tmp_path):
  write_tree(tmp_path, ['ant/a.png', 'bee/b.png'])
  (tmp_path / 'metadata.jsonl').write_text('{"file_name": "ant/a.png", "width": 6}\n')
  (tmp_path / 'README.txt').write_text('of no image')
  save(tmp_path / '.hidden/c.png', pixels(3))
  write_lists(tmp_path, '.hidden/captions.jsonl', {'c.png': 'hidden'})
  assert sources.load(f'folder:{tmp_path}').class_names == ['ant', 'bee']


LINE = '{"file_name": "a.png", "text": "one"}\n'


@pytest.mark.parametrize(('files', 'words'), [
    ({'captions.jsonl': LINE + '{"file_name": "z.png", "text": "two"}'},
     'captions.jsonl, line 2: there is no image z.png: add it'),
    ({'captions.jsonl': LINE + '{"file_name": "../b.png", "text": "two"}'}, 'there is no image ../b.png'),
    ({'captions.jsonl': LINE}, "b.png has no caption, and 1 of the 2 images of the split 'train' have one"),
    ({'a.txt': 'one'}, "b.png has no caption, and 1 of the 2 images of the split 'train' have one"),
    ({'a.txt': 'one', 'b.txt': 'two', 'c.txt': 'three'}, 'c.txt is the caption of no image, and a.txt is of the image'),
    ({'captions.jsonl': LINE, 'b.txt': 'two'}, 'captions.jsonl and b.txt both hold captions: keep the .jsonl or'),
    ({'captions.jsonl': LINE + '\n{"file_name": "b.png", "text"}'}, 'captions.jsonl, line 3 is not JSON ('),
    ({'metadata.jsonl': '["a.png", "one"]'}, 'metadata.jsonl, line 1 is ["a.png", "one"], expected an object'),
    ({'metadata.jsonl': LINE + '{"file_name": "b.png"}'}, 'metadata.jsonl, line 2: text is None, expected a string'),
    ({'captions.jsonl': '{"text": "one"}'}, 'captions.jsonl, line 1: file_name is None, expected a string'),
    ({'captions.jsonl': '{"file_name": "a.png", "text": ["one"]}'}, "line 1: text is ['one'], expected a string"),
    ({'captions.jsonl': LINE + LINE}, 'captions.jsonl, line 2: a.png has a caption already: keep one of them'),
    ({'captions.jsonl': LINE, 'metadata.jsonl': LINE}, 'metadata.jsonl, line 1: a.png has a caption already'),
    ({'a.txt': b'\xff\xfeo\x00', 'b.txt': b'two'}, 'a.txt is not UTF-8 text ('),
])
@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_captions_that_cannot_be_used_are_named(files, words, kind, tmp_path):
  root = write_tree(tmp_path / 'root', ['a.png', 'b.png'])
  for path, content in files.items():
    (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())
  name = f'folder:{root}' if kind == 'folder' else f'zip:{write_zip(tmp_path / "root.zip", root)}'
  with pytest.raises(ValueError, match=re.escape(words)) as error:
    sources.load(name)
  assert str(error.value).startswith(name) and str(error.value).count('\n') == 0
