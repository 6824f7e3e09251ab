import numpy as np
import pytest

from jaxlab import data


def case(count=600, classes=6, others=400):
  labels = np.arange(count) % classes
  images = np.broadcast_to(np.arange(count, dtype=np.int32)[:, None], (count, 2))
  outside = -1 - np.broadcast_to(np.arange(others, dtype=np.int32)[:, None], (others, 2))
  return images, labels, outside


def made(seed=0, closed=0.3, open=0.2, imbalance=5.0, **options):
  return data.make_ncifar(np.random.default_rng(seed), *case(), closed, open, imbalance, **options)


def test_sizes_fall_exponentially_and_noise_has_its_rates():
  found = made(imbalance=1.0)
  image, noisy, true = (found[name] for name in ('image', 'noisy_label', 'true_label'))
  assert len(image) == len(noisy) == len(true) == 600
  outside = true == -1
  np.testing.assert_array_equal(outside, image[:, 0] < 0)
  counts = np.bincount(noisy, minlength=6)
  np.testing.assert_array_equal(
    np.bincount(noisy[outside], minlength=6), (0.2 * counts).astype(int)
  )
  assert len(np.unique(image[outside, 0])) == outside.sum()  # none twice
  inside = ~outside
  np.testing.assert_array_equal(true[inside], image[inside, 0] % 6)  # images go with their labels
  assert abs(np.mean(noisy[inside] != true[inside]) - 0.3) < 0.05
  moved = noisy[inside & (noisy != true)]
  assert np.bincount(moved, minlength=6).min() > 10


def test_classes_are_unequal_in_random_order():
  clean = made(closed=0.0, open=0.0)
  counts = np.bincount(clean['true_label'])
  np.testing.assert_array_equal(np.sort(counts)[::-1], data.exponential_counts(6, 100, 5))
  np.testing.assert_array_equal(clean['noisy_label'], clean['true_label'])
  assert np.any(np.bincount(made(1, 0.0, 0.0)['true_label']) != counts)
  again = made(closed=0.0, open=0.0)
  np.testing.assert_array_equal(clean['image'], again['image'])
  assert np.bincount(made(max_count=50, closed=0.0, open=0.0)['true_label']).max() == 50


def test_few_images_of_no_class_may_be_drawn_again():
  images, labels, outside = case(others=20)
  options = (np.random.default_rng(0), images, labels, outside, 0.0, 0.5)
  with pytest.raises(ValueError, match='ood_images: 300 are needed, 20 are there'):
    data.make_ncifar(*options)
  found = data.make_ncifar(*options, replace=True)
  assert (found['true_label'] == -1).sum() == 300


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'closed': 0.5, 'open': 0.5}, 'with a sum below 1'),
    ({'closed': -0.1}, 'rates of at least 0'),
    ({'imbalance': 0.5}, 'imbalance=0.5'),
    ({'max_count': 101}, 'should have 101 records, 100 are there'),
  ],
)
def test_sets_that_cannot_be_made_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    made(**options)


def test_images_of_two_kinds_are_refused():
  images, labels, outside = case()
  for wrong in (outside[:, :1], outside.astype(np.float32)):
    with pytest.raises(ValueError, match='one shape and type'):
      data.make_ncifar(np.random.default_rng(0), images, labels, wrong, 0.1, 0.1)
