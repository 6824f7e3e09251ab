import numpy as np
import pytest

from jaxlab import data


def rng(seed=0):
  return np.random.default_rng(seed)


LABELS = np.arange(20_000) % 10


@pytest.mark.parametrize('include_true', [True, False])
def test_symmetric_noise_is_uniform_over_the_classes_that_it_draws(include_true):
  noisy = data.symmetric_noise(rng(), LABELS, 0.4, 10, include_true=include_true)
  wrong = noisy != LABELS
  assert abs(data.noise_rate(noisy, LABELS) - 0.4 * (0.9 if include_true else 1)) < 0.01
  steps = np.bincount((noisy - LABELS)[wrong] % 10, minlength=10) / wrong.sum()
  np.testing.assert_allclose(steps[1:], 1 / 9, atol=0.01)
  again = data.symmetric_noise(rng(), LABELS, 0.4, 10, include_true=include_true)
  np.testing.assert_array_equal(noisy, again)
  assert np.any(noisy != data.symmetric_noise(rng(1), LABELS, 0.4, 10, include_true=include_true))


def test_asymmetric_noise_goes_to_the_class_that_is_mistaken_and_no_further():
  noisy = data.asymmetric_noise(rng(), LABELS, 0.3, data.CIFAR10_CONFUSIONS)
  wrong = noisy != LABELS
  assert set(zip(LABELS[wrong].tolist(), noisy[wrong].tolist())) == set(
    data.CIFAR10_CONFUSIONS.items()
  )
  assert abs(np.mean(wrong) - 0.15) < 0.01


def test_classes_of_cifar100_are_mistaken_within_their_superclass():
  confusions = data.next_class(data.CIFAR100_SUPERCLASSES)
  groups = np.asarray(data.CIFAR100_SUPERCLASSES)
  np.testing.assert_array_equal(np.bincount(groups), 5)
  assert sorted(confusions) == sorted(confusions.values()) == list(range(100))
  for one, other in confusions.items():
    assert one != other and groups[one] == groups[other]
    assert other > one or other == np.flatnonzero(groups == groups[one]).min()


def test_no_noise_changes_nothing_and_classes_without_confusions_stay():
  np.testing.assert_array_equal(data.symmetric_noise(rng(), LABELS, 0.0, 10), LABELS)
  np.testing.assert_array_equal(data.asymmetric_noise(rng(), LABELS, 0.9, {}), LABELS)


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: data.symmetric_noise(rng(), LABELS, 1.0, 10), r'rate=1.0: expected a share'),
    (lambda: data.symmetric_noise(rng(), LABELS, -0.1, 10), r'rate=-0.1'),
    (lambda: data.symmetric_noise(rng(), LABELS, 0.5, 5), 'classes'),
    (lambda: data.symmetric_noise(rng(), LABELS * 0, 0.5, 1), 'at least two'),
    (lambda: data.asymmetric_noise(rng(), LABELS / 3, 0.5, {}), 'labels'),
    (lambda: data.noise_rate(LABELS, LABELS[:3]), 'of one shape'),
  ],
)
def test_what_does_not_fit_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_relabeled_records_keep_all_but_their_label():
  images = np.zeros((3, 2, 2, 1), np.uint8)
  source = data.InMemory({'image': images, 'label': np.array([0, 1, 2])})
  other = data.Relabeled(source, np.array([2, 2, 1]))
  assert [int(other[i]['label']) for i in range(3)] == [2, 2, 1]
  assert other.gather(np.array([2, 0]))['label'].tolist() == [1, 2]
  assert data.source_labels(other).tolist() == [2, 2, 1] and other[1]['index'] == 1
  assert data.source_labels(source).tolist() == [0, 1, 2]
  with pytest.raises(ValueError, match='2 labels for 3 records'):
    data.Relabeled(source, np.array([0, 1]))
  with pytest.raises(ValueError, match='classes'):
    data.Relabeled(source, np.array([0, 1, 3]))
  several = data.InMemory({'image': images, 'multi_label': np.eye(3, 2, dtype=np.float32)}, 2)
  other = data.Relabeled(several, np.array([[1, 1], [0, 0], [0, 1]]))
  assert other[0]['multi_label'].tolist() == [1, 1]
  assert other.gather(np.array([2]))['multi_label'].dtype == np.float32
  with pytest.raises(ValueError):
    data.Relabeled(several, np.array([[1, 2], [0, 0], [0, 1]]))
