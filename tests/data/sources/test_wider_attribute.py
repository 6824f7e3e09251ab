import json

import numpy as np
import pytest
from PIL import Image

from jaxlab import data

PERSONS = [
  {'bbox': [2, 1, 4, 5], 'attribute': [1, -1, 0]},
  {'bbox': [-2, 3, 5, 99], 'attribute': [0, 1, 1]},
]
NAMES = {'1': 'Hat', '0': 'Male', '10': 'Skirt'}


def annotations(folder, **changes):
  images = [{'file_name': 'train/a.png', 'targets': PERSONS}, {'file_name': 'b.png', 'targets': []}]
  path = folder / 'all.json'
  path.write_text(json.dumps({'images': images, 'attribute_id_map': NAMES, **changes}))
  return path


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'train').mkdir()
  pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / 'train' / 'a.png')
  return tmp_path, pixels


def test_each_person_is_an_image_of_the_size_of_its_box(folder):
  root, pixels = folder
  source = data.load('wider_attribute', str(annotations(root)), root=root)
  assert len(source) == 2 and source.num_classes == 3
  assert source.class_names == ('Male', 'Hat', 'Skirt')
  first, second = source[0], source[1]
  np.testing.assert_array_equal(first['image'], pixels[1:6, 2:6])
  np.testing.assert_array_equal(second['image'], pixels[3:, :3])  # cut off at the edges
  assert first['multi_label'].tolist() == [1, 0, 0] and first['known'].tolist() == [1, 1, 0]
  assert second['multi_label'].tolist() == [0, 1, 1] and second['known'].tolist() == [0, 1, 1]
  resized = data.DecodeImage(7, stretch=True)(second)
  assert resized['image'].shape == (7, 7, 3) and second['index'] == 1


def test_annotations_of_another_form_are_named(folder):
  root, _ = folder
  with pytest.raises(FileNotFoundError, match='there are no annotations'):
    data.WiderAttribute(root / 'none.json', root)
  with pytest.raises(FileNotFoundError, match='root must be the folder'):
    data.WiderAttribute(annotations(root), root / 'train')
  (root / 'broken.json').write_text('{"images": ')
  with pytest.raises(ValueError, match='expected JSON with attribute_id_map'):
    data.WiderAttribute(root / 'broken.json', root)
  for changes, message in (
    ({'attribute_id_map': None}, 'expected JSON with attribute_id_map'),
    ({'images': []}, 'lists no persons'),
  ):
    with pytest.raises(ValueError, match=message):
      data.WiderAttribute(annotations(root, **changes), root)
  for person in ({'bbox': [0, 0, 1]}, {'attribute': [1, 0]}, {'attribute': [1, 0, 2]}):
    image = {'file_name': 'train/a.png', 'targets': [{**PERSONS[0], **person}]}
    with pytest.raises(ValueError, match='a person in train/a'):
      data.WiderAttribute(annotations(root, images=[image]), root)
  outside = {'file_name': 'train/a.png', 'targets': [{**PERSONS[0], 'bbox': [40, 0, 3, 3]}]}
  with pytest.raises(ValueError, match='is outside of train/a'):
    data.WiderAttribute(annotations(root, images=[outside]), root)[0]
