import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import classifiers


def expectation_maximization(losses, iterations=10, tolerance=1e-2, floor=5e-4):
  """Returns the posterior of the component with the smaller mean, in float64, one example after the other."""
  x = (losses - losses.min()) / (losses.max() - losses.min())
  weights, means, variances = np.full(2, 0.5), np.array([0.0, 1.0]), np.full(2, max(x.var(), floor))
  before = -np.inf

  def densities():
    return (
      weights
      * np.exp(-((x[:, None] - means) ** 2) / (2 * variances))
      / np.sqrt(2 * np.pi * variances)
    )

  for _ in range(iterations):
    own = densities()
    now = np.log(own.sum(1)).mean()
    shares = own / own.sum(1, keepdims=True)
    sizes = shares.sum(0)
    weights, means = sizes / sizes.sum(), shares.T @ x / sizes
    variances = np.maximum((shares * (x[:, None] - means) ** 2).sum(0) / sizes, floor)
    if abs(now - before) < tolerance:
      break
    before = now
  own = densities()
  return (own / own.sum(1, keepdims=True))[:, np.argmin(means)]


@pytest.fixture(scope='module')
def losses():
  rng = np.random.default_rng(0)
  return np.concatenate([rng.gamma(2, 0.2, 70), rng.normal(3, 0.6, 30)])


def test_the_mixture_is_that_of_expectation_maximization(losses):
  for iterations in (1, 3):
    found = classifiers.fit_gmm_1d(losses, iterations=iterations, tolerance=0.0)
    expected = expectation_maximization(losses, iterations, 0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(
    classifiers.fit_gmm_1d(losses), expectation_maximization(losses), rtol=1e-3, atol=1e-4
  )
  found = np.asarray(classifiers.fit_gmm_1d(losses))
  assert (found[:70] > 0.5).mean() > 0.9 and (found[70:] < 0.5).mean() > 0.9


@pytest.mark.exhaustive
def test_masked_mixtures_of_many_classes_are_those_of_each(losses):
  labels = np.arange(100) % 3
  masks = labels == np.arange(3)[:, None]
  found = jax.jit(jax.vmap(classifiers.fit_gmm_1d, (None, 0)))(losses, masks)
  for own, mask in zip(found, masks, strict=True):
    np.testing.assert_allclose(
      own[mask], classifiers.fit_gmm_1d(losses[mask]), rtol=1e-4, atol=1e-5
    )
    assert not np.any(own[~mask])


@pytest.mark.exhaustive
def test_equal_or_few_losses_are_clean():
  assert classifiers.fit_gmm_1d(jnp.full(4, 2.5)).tolist() == [1] * 4
  mask = np.array([True, False, False])
  assert classifiers.fit_gmm_1d(jnp.array([9.0, 1, 2]), mask).tolist() == [1, 0, 0]
  hidden = np.array([np.nan, 1.0, 1.0])
  assert classifiers.fit_gmm_1d(hidden, np.array([False, True, True])).tolist() == [0, 1, 1]


@pytest.mark.exhaustive
def test_a_rare_class_survives_next_to_one_with_small_losses():
  rng = np.random.default_rng(1)
  # Even the clean labels of the rare class have larger losses than the wrong ones of the other.
  parts = [rng.normal(0.1, 0.02, 60), rng.normal(1.0, 0.1, 20), rng.normal(2.0, 0.1, 15)]
  losses = np.concatenate([*parts, rng.normal(4.0, 0.2, 5)])
  labels = np.array([0] * 80 + [1] * 20)
  clean = classifiers.clean_by_class(losses, labels, 2)
  np.testing.assert_array_equal(clean, [True] * 60 + [False] * 20 + [True] * 15 + [False] * 5)


@pytest.mark.exhaustive
def test_a_class_of_few_examples_keeps_its_smaller_half():
  found = classifiers.clean_by_class(jnp.array([3.0, 1, 2, 9, 9]), jnp.array([0, 0, 0, 1, 1]), 3)
  assert found.tolist() == [False, True, True, True, False]


def test_what_is_not_clean_is_corrected_where_the_network_is_sure():
  losses, given = jnp.array([0.1, 3.0, 3.0, 0.1]), jnp.array([0, 0, 1, 1])
  probs = jnp.array([[0.2, 0.8], [0.05, 0.95], [0.6, 0.4], [0.5, 0.5]])
  clean = jnp.array([True, False, False, True])
  found = jax.jit(lambda *own: classifiers.filter_and_correct(*own, 0.9, 2, clean=clean))(
    losses, given, probs
  )
  assert found.keep.tolist() == [True, True, False, True]
  assert found.label.tolist() == [0, 1, 1, 1]
  assert found.corrected.tolist() == [False, True, False, False]
  off = classifiers.filter_and_correct(losses, given, probs, 0.9, 2, clean=clean, correct=False)
  assert off.keep.tolist() == clean.tolist() and off.label.tolist() == given.tolist()


def test_a_class_never_loses_all_its_examples():
  losses, given = jnp.array([0.1, 2.0, 1.0, 3.0]), jnp.array([0, 1, 1, 1])
  probs = jnp.full((4, 2), 0.5).at[1].set(jnp.array([1.0, 0.0]))
  clean = jnp.array([True, False, False, False])
  found = classifiers.filter_and_correct(losses, given, probs, 0.9, 2, clean=clean)
  # The second would be corrected; its class then has none, and gets back the half with smaller losses.
  assert found.keep.tolist() == [True, True, True, False]
  assert found.label.tolist() == [0, 1, 1, 1] and not found.corrected.any()


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: classifiers.fit_gmm_1d(jnp.array([1.0, np.nan])), 'losses .* NaN'),
    (lambda: classifiers.fit_gmm_1d(jnp.ones((2, 2))), r'must be \[examples\]'),
    (lambda: classifiers.fit_gmm_1d(jnp.ones(2), jnp.ones(3, bool)), r'must be \[examples\]'),
    (lambda: classifiers.fit_gmm_1d(jnp.ones(2), iterations=0), 'iterations=0'),
    (lambda: classifiers.clean_by_class(jnp.ones(2), jnp.array([0, 2]), 2), 'labels must be in'),
    (
      lambda: classifiers.filter_and_correct(jnp.ones(2), jnp.zeros(2, int), jnp.ones((2, 3)), 0.9, 2),
      r'probs must be \[examples, 2\]',
    ),
    (
      lambda: classifiers.filter_and_correct(jnp.ones(2), jnp.zeros(2, int), jnp.ones((2, 2)), 1.1, 2),
      'tau must be in',
    ),
  ],
)  # fmt: skip
def test_what_cannot_be_filtered_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
