import functools

import jax
import numpy as np
import pytest
from golden_vectors import assert_close
from test_noisy_head import blobs

from jaxlab.classifiers import (
  bisect_epsilon,
  fit_max_margin,
  margin_head,
  noisy_accuracy,
  search_epsilon,
  train_head,
)
from jaxlab.classifiers.noisy_head import initial_params

HEAD = margin_head(3)
OPTIONS = {'num_copies': 8, 'batch_size': 64, 'right': 8.0, 'tolerance': 0.6}
OPTIONS |= {'search_epochs': 6, 'threshold_epochs': 10, 'search_learning_rate': 1.0}
X, Y = blobs(30)
# One compilation for all tests: two draws at once.
FIT = jax.jit(
  jax.vmap(lambda key, x: fit_max_margin(key, HEAD, x, Y, learning_rate=0.5, epochs=40, **OPTIONS))
)


@pytest.fixture(scope='module')
def fits():
  """IbM2 on two draws."""
  keys = jax.random.split(jax.random.key(0), 2)
  features = np.stack([X, blobs(30, seed=1)[0]])
  return keys, features, FIT(keys, features)


def test_the_compiled_search_takes_the_steps_of_the_host_reference(fits):
  keys, features, found = fits
  found = found.search
  noise = {'num_copies': OPTIONS['num_copies']}

  @jax.jit
  def step(train_key, eval_key, x, params, epsilon, iteration):
    params = train_head(
      jax.random.fold_in(train_key, iteration), HEAD, params, x, Y, epsilon=epsilon,
      epochs=OPTIONS['search_epochs'], batch_size=64, learning_rate=1.0, **noise,
    )  # fmt: skip
    key = jax.random.fold_in(eval_key, iteration)
    return params, noisy_accuracy(key, HEAD, params, x, Y, epsilon=epsilon, **noise)

  for run in range(2):
    key, x = keys[run], features[run]
    _, search_key, *keys_of_step = jax.random.split(jax.random.split(key, 3)[0], 4)
    head = {'params': initial_params(search_key, HEAD, x), 'iteration': 0}

    def evaluate(epsilon, head=head, fixed=(*keys_of_step, x)):
      head['params'], accuracy = step(*fixed, head['params'], epsilon, head['iteration'])
      head['iteration'] += 1
      return accuracy

    epsilon, trace = bisect_epsilon(
      evaluate, float(found.threshold[run]), right=8.0, tolerance=OPTIONS['tolerance']
    )
    assert epsilon == float(found.epsilon[run])
    assert_close(found.trace[run], trace, 0.01)


def test_the_interval_is_short_and_holds_epsilon(fits):
  found = fits[2].search
  left, end = np.asarray(found.interval).T
  np.testing.assert_array_equal(found.epsilon, (left + end) / 2)
  assert np.all(end - left < OPTIONS['tolerance'])
  assert np.all(left > 0) and np.all(end < 8)
  for trace, threshold, low, high in zip(found.trace, found.threshold, left, end):
    fits = np.asarray(trace[:, 1]) > float(threshold)
    assert low == max(np.asarray(trace[:, 0])[fits], default=0.0)
    assert high == min(np.asarray(trace[:, 0])[~fits], default=8.0)


def test_the_threshold_is_capped_and_falls_to_what_can_be_fitted(fits):
  assert_close(fits[2].search.threshold, np.full(2, 0.9), 1e-6)
  # Equal features of different classes: at most a third can be right.
  found = FIT(fits[0], np.ones_like(fits[1])).search
  assert_close(found.threshold, np.full(2, 1 / 3), 1e-6)
  assert np.all(np.asarray(found.epsilon) < OPTIONS['tolerance'])


def test_the_final_head_is_a_fresh_one_trained_at_the_epsilon_found(fits):
  keys, features, found = fits

  @jax.jit
  def train(key, x, epsilon):
    _, init_key, train_key = jax.random.split(key, 3)
    params = initial_params(init_key, HEAD, x)
    params = train_head(
      train_key, HEAD, params, x, Y, epsilon=epsilon, num_copies=OPTIONS['num_copies'],
      epochs=40, batch_size=64, learning_rate=0.5,
    )  # fmt: skip
    noisy = noisy_accuracy(jax.random.key(3), HEAD, params, x, Y, epsilon=epsilon, num_copies=50)
    return params, noisy, noisy_accuracy(key, HEAD, params, x, Y)

  params, noisy, clean = train(keys[0], features[0], found.search.epsilon[0])
  for name, value in params.items():
    assert_close(found.params[name][0], value, 1e-4)
  assert float(clean) > 0.95 and float(noisy) > 0.85
  assert not np.allclose(found.params['v'], found.search.params['v'])


@pytest.mark.exhaustive
def test_the_search_runs_op_by_op_and_in_a_program_that_closes_over_the_examples():
  options = {'num_copies': 2, 'search_epochs': 1, 'threshold_epochs': 1, 'epochs': 1}
  x, y = jax.numpy.asarray(X), jax.numpy.asarray(Y)

  def fit(key):
    return fit_max_margin(key, HEAD, x, y, **options, right=8.0, tolerance=5.0)

  found, traced = fit(jax.random.key(0)), jax.eval_shape(fit, jax.random.key(0))
  assert found.search.interval.tolist() in ([0, 4], [4, 8])
  assert float(found.search.epsilon) == np.mean(found.search.interval)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(traced), strict=True):
    assert np.isfinite(a).all() and a.shape == b.shape and a.dtype == b.dtype


def test_an_interval_that_is_short_from_the_start_is_not_searched():
  options = {'num_copies': 2, 'epochs': 1, 'threshold_epochs': 1}
  search = functools.partial(search_epsilon, right=2.0, tolerance=3.0, **options)
  found = jax.jit(search, static_argnums=1)(jax.random.key(0), HEAD, X, Y)
  assert float(found.epsilon) == 1 and found.interval.tolist() == [0, 2]
  assert found.trace.shape == (0, 4)


def test_bad_arguments_raise_before_any_work():
  key = jax.random.key(0)
  with pytest.raises(ValueError, match='right=0 must be positive'):
    search_epsilon(key, HEAD, X, Y, right=0)
  with pytest.raises(ValueError, match='one for each of the 30 features'):
    search_epsilon(key, HEAD, X, Y[:4])
  with pytest.raises(ValueError, match=r'labels must be in \[0, 3\)'):
    fit_max_margin(key, HEAD, X, Y + 1)
  with pytest.raises(ValueError, match='at least 2 examples'):
    fit_max_margin(key, HEAD, X[:1], Y[:1])
  with pytest.raises(TypeError, match='rigth'):
    fit_max_margin(key, HEAD, X, Y, rigth=3.0)
