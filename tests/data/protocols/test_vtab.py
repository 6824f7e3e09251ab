import numpy as np
import pytest

from jaxlab import data
from jaxlab.data.protocols.vtab import CLEVR_DISTANCES, KITTI_DISTANCES, NO_VEHICLE


def test_there_are_nineteen_tasks_in_three_groups():
  groups = [task.group for task in data.VTAB_TASKS.values()]
  assert [groups.count(name) for name in ('natural', 'specialized', 'structured')] == [7, 4, 8]


def test_the_catalogue_has_the_data_sets():
  import tensorflow_datasets as tfds

  for name in {task.tfds for task in data.VTAB_TASKS.values() if task.tfds}:
    assert tfds.builder_cls(name).name == name


def test_the_mean_is_that_of_groups_as_published():
  # DTL with ViT-B/16, in the order of the tasks.
  published = (
    *(69.6, 94.8, 71.3, 99.3, 91.3, 83.3, 56.2),
    *(87.1, 96.2, 86.1, 75.0),
    *(82.8, 64.2, 48.8, 81.9, 93.9, 53.9, 34.2, 47.1),
  )
  means = data.vtab_group_means(dict(zip(data.VTAB_TASKS, published, strict=True)))
  assert {name: round(value, 1) for name, value in means.items()} == {
    'natural': 80.8, 'specialized': 86.1, 'structured': 63.4, 'mean': 76.8
  }  # fmt: skip
  with pytest.raises(ValueError, match=r"missing \['caltech101'.*unknown \['cars'\]"):
    data.vtab_group_means({'cars': 1.0})


def test_distances_fall_into_the_bin_below_a_bound():
  rng = np.random.default_rng(0)
  for name, bounds, top in (
    ('clevr_dist', CLEVR_DISTANCES, 99.0), ('kitti', KITTI_DISTANCES, NO_VEHICLE)
  ):  # fmt: skip
    distances = np.concatenate([rng.uniform(0.1, 30, 50), bounds[1:], [top]])
    expected = [max(j for j, bound in enumerate(bounds) if bound < d) for d in distances]
    assert data.distance_bin(distances, bounds).tolist() == expected
    assert 1 + max(expected) == data.VTAB_TASKS[name].num_classes


def test_latent_values_are_grouped_evenly():
  for count in (32, 40):
    labels = data.grouped_label(np.arange(count), count)
    assert labels.tolist() == [int(np.floor(v * 16 / count)) for v in range(count)]
    assert np.bincount(labels).min() >= count // 16


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda: data.distance_bin([0.0], CLEVR_DISTANCES), 'above 0'),
    (lambda: data.distance_bin([np.nan], CLEVR_DISTANCES), 'got nan'),
    (lambda: data.distance_bin([150.0], CLEVR_DISTANCES, 6), 'bin 6 of 6 classes'),
    (lambda: data.clevr_count_label([2]), 'from 3 to 10'),
    (lambda: data.clevr_count_label([3.5]), 'must be integers'),
    (lambda: data.grouped_label([40], 40), 'from 0 to 39'),
    (lambda: data.grouped_label([0], 8), 'num_values=8'),
    (lambda: data.split_800_200(799, 200), '799 and 200 images'),
  ],
)
def test_labels_that_cannot_be_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
