import numpy as np
import pytest
from PIL import Image

from experiments.harness import data as harness_data
from jaxlab import data


def write(root, names):
  for number, name in enumerate(names):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(path)


def test_classes_of_a_split_are_those_of_the_training_split_by_name(tmp_path):
  write(
    tmp_path, ['train/a/0.png', 'train/b/1.png', 'train/c/2.png', 'test/b/3.png', 'test/c/4.png']
  )
  train, test = (data.load('image_folder', split, root=tmp_path) for split in ('train', 'test'))
  assert test.class_names == train.class_names == ('a', 'b', 'c')
  assert test.labels.tolist() == [1, 2] and test.num_classes == 3
  assert data.load('image_folder', 'test', root=tmp_path, classes_of=None).class_names == ('b', 'c')
  write(tmp_path, ['test/d/5.png'])
  with pytest.raises(ValueError, match='not among the 3 classes: d'):
    data.load('image_folder', 'test', root=tmp_path)


def test_a_setting_maps_classes_by_name_whatever_its_splits_are_called(tmp_path):
  write(
    tmp_path,
    ['A/fit/a/0.png', 'A/fit/b/1.png', 'A/fit/c/2.png', 'B/judge/b/3.png', 'B/judge/c/4.png'],
  )
  own = harness_data.Images(
    name='image_folder',
    num_classes=3,
    stored_image=(4, 4, 3),
    train_split='fit',
    test_split='judge',
    train_options={'root': str(tmp_path / 'A')},
    test_options={'root': str(tmp_path / 'B')},
  )
  assert harness_data.load(own, 'test').labels.tolist() == [1, 2]
  write(tmp_path, ['A/fit/d/5.png'])
  with pytest.raises(
    ValueError, match=r"image_folder, split 'fit': 1 labels are out of range 0\.\.2"
  ):
    harness_data.load(own, 'train')


def test_classes_of_a_split_may_be_those_of_a_folder_elsewhere(tmp_path):
  write(tmp_path, ['A/fit/a/0.png', 'A/fit/b/1.png', 'B/judge/b/3.png'])
  root, fit = tmp_path / 'B', str(tmp_path / 'A' / 'fit')
  assert data.load('image_folder', 'judge', root=root, classes_of=fit).labels.tolist() == [1]
  with pytest.raises(FileNotFoundError, match='fit is not a folder'):
    data.load('image_folder', 'judge', root=root, classes_of='fit')


def test_an_image_folder_without_root_is_named():
  with pytest.raises(ValueError, match='needs the option root='):
    data.load('image_folder', 'train')


def test_what_other_programs_leave_is_no_data(tmp_path):
  write(
    tmp_path,
    ['a/0.png', 'a/._0.png', 'a/.ipynb_checkpoints/0.png', 'a/__MACOSX/0.png', 'a/x/1.png'],
  )
  write(tmp_path, ['__MACOSX/a/0.png', '.cache/0.png'])
  source = data.ImageFolder(tmp_path)
  assert source.class_names == ('a',) and len(source) == 2
