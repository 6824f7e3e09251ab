"""The tasks of VTAB-1k: splits as published, labels of annotations, records; without any data set."""

import numpy as np
import pytest

from jaxlab import data
from jaxlab.data.sources import vtab_images
from jaxlab.data.sources.vtab_images import ORIGINS


class Listed:
  """A data set of the catalogue whose records are made of their number."""

  asked = []  # noqa: RUF012
  num_classes, class_names = 0, ()

  def __init__(self, name, split, **options):
    self.asked.append((name, split, options))
    self.length = {'train': 1500, 'train[:90%]': 1300, 'test': 700}.get(split, 400)
    self.split = split

  def __len__(self):
    return self.length

  def __getitem__(self, index):
    image = np.full((4, 4, 1), index % 2, np.uint8)
    latents = {'label_x_position': index % 32, 'label_azimuth': index % 18}
    return {'image': image, 'label': index % 100, 'index': index, 'of': self.split, **latents}


@pytest.fixture
def catalogue(monkeypatch):
  monkeypatch.setattr(vtab_images, 'Catalogue', Listed)
  Listed.asked.clear()
  return Listed.asked


def test_the_thousand_images_are_800_and_200(catalogue):
  found = data.load('vtab', 'train800val200', task='cifar_100')
  assert [own[:2] for own in catalogue] == [
    ('cifar100', 'train[:90%]'),
    ('cifar100', 'train[90%:]'),
  ]
  assert len(found) == 1000 and found.num_classes == 100
  labels = [int(found[i]['label']) for i in (0, 799, 800, 999)]
  assert labels == [0, 99, 0, 99] and found[999]['index'] == 999
  sizes = {split: len(data.load('vtab', split, task='cifar_100')) for split in
           ('train', 'train800', 'val200', 'test')}  # fmt: skip
  assert sizes == {'train': 1000, 'train800': 800, 'val200': 200, 'test': 700}
  with pytest.raises(IndexError):
    found[1000]


def test_gray_images_have_three_channels_and_labels_their_groups(catalogue):
  found = data.load('vtab', 'test', task='dsprites_loc')
  assert catalogue[0][1:] == (
    'train[90%:]', {'data_dir': None, 'decode': True, 'fields': ('label_x_position',), 'label': None}
  )  # fmt: skip
  assert found[1]['image'].shape == (4, 4, 3) and set(np.unique(found[1]['image'])) == {255}
  assert [int(found[i]['label']) for i in (0, 1, 2, 31)] == [0, 0, 1, 15]
  assert data.load('vtab', 'test', task='smallnorb_azi')[19]['label'] == 1


def test_labels_are_made_of_annotations():
  clevr = {'objects': {'size': [0] * 5, 'pixel_coords': np.array([[1, 2, 9.2], [3, 4, 8.4]])}}
  assert ORIGINS['clevr_count'].label(clevr) == 2 and ORIGINS['clevr_dist'].label(clevr) == 1
  # A pedestrian (type 3) is nearer than the van.
  street = {'objects': {'type': [3, 1], 'location': [[0, 0, 3.0], [0, 0, 12.0]]}}
  assert ORIGINS['kitti'].label(street) == 1
  nobody = {'objects': {'type': [], 'location': np.zeros((0, 3))}}
  assert ORIGINS['kitti'].label(nobody) == 3


def test_all_tasks_have_an_origin_with_features_of_the_catalogue():
  import tensorflow_datasets as tfds

  assert list(ORIGINS) == list(data.VTAB_TASKS)
  for task, own in ORIGINS.items():
    name = own.name or data.VTAB_TASKS[task].tfds
    assert name.startswith(data.VTAB_TASKS[task].tfds)
    if task in ('kitti', 'dsprites_ori', 'smallnorb_ele', 'clevr_dist', 'sun397'):
      features = tfds.builder(name).info.features
      assert {'image', *(own.fields or ('label',))} <= set(features)
      if task == 'kitti':
        assert features['objects']['type'].names[: vtab_images.VEHICLES] == ['Car', 'Van', 'Truck']


@pytest.mark.parametrize(
  ('split', 'task', 'message'),
  [('train', 'mnist', "task='mnist'"), ('val', 'dtd', "split='val'")],
)
def test_what_there_is_not_is_refused(split, task, message):
  with pytest.raises(ValueError, match=message):
    data.VtabImages(split, task=task)
