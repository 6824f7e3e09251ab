import pytest

from experiments.harness.known_data import KNOWN
from jaxlab import data
from jaxlab.data.sources.fine_grained import ANNOTATIONS, TASKS

SETS = data.FINE_GRAINED_DATASETS


def test_splits_are_parts_of_their_data_sets():
  for key, own in SETS.items():
    for name, split in own.splits.items():
      assert 0 < split.images <= own.num_images, (key, name)
      assert split.classes is None or split.classes < own.num_classes, (key, name)
    pairs = [('train', 'test')] * (own.tasks[0] == 'recognition')
    pairs += [('retrieval_train', 'retrieval_test')]
    for pair in pairs:
      parts = [own.splits[name] for name in pair if name in own.splits]
      if len(parts) == 2 and 'validation' not in own.splits:
        total = sum(split.images for split in parts)
        assert total == own.num_images, key
        classes = [split.classes for split in parts if split.classes]
        assert not classes or sum(classes) == own.num_classes, key
    assert set(own.annotations) <= set(ANNOTATIONS) and set(own.tasks) <= set(TASKS)


def test_the_catalogue_has_what_the_table_says_it_has():
  import tensorflow_datasets as tfds

  for own in SETS.values():
    if own.tfds:
      assert tfds.builder_cls(own.tfds).name == own.tfds
    if own.tfds in KNOWN:
      known = KNOWN[own.tfds]
      assert known['num_classes'] == own.num_classes
      assert known['train_size'] == own.splits['train'].images


def test_data_sets_are_found_by_task_annotation_and_catalogue():
  assert list(SETS) == data.list_fine_grained()
  boxes = data.list_fine_grained('retrieval', 'boxes')
  assert boxes == [
    k for k, v in SETS.items() if 'retrieval' in v.tasks and 'boxes' in v.annotations
  ]
  assert 'cub200' in boxes and 'online_products' not in boxes
  assert all(SETS[key].tfds for key in data.list_fine_grained(catalogued=True))
  for given, message in (
    ({'task': 'detection'}, "task='detection': expected one of recognition"),
    ({'annotation': 'masks'}, "annotation='masks': expected one of boxes"),
  ):
    with pytest.raises(ValueError, match=message):
      data.list_fine_grained(**given)
