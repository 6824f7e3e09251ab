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
  for run in range(2):
    key, x = keys[run], features[run]
    _, search_key, train_key, eval_key = jax.random.split(jax.random.split(key, 3)[0], 4)
    head = {'params': initial_params(search_key, HEAD, x), 'iteration': 0}
    noise = {'num_copies': OPTIONS['num_copies']}

    @jax.jit
    def step(params, epsilon, iteration, x=x, train_key=train_key, eval_key=eval_key, noise=noise):
      params = train_head(
        jax.random.fold_in(train_key, iteration), HEAD, params, x, Y, epsilon=epsilon,
        epochs=OPTIONS['search_epochs'], batch_size=64, learning_rate=1.0, **noise,
      )  # fmt: skip
      key = jax.random.fold_in(eval_key, iteration)
      return params, noisy_accuracy(key, HEAD, params, x, Y, epsilon=epsilon, **noise)

    def evaluate(epsilon, head=head, step=step):
      head['params'], accuracy = step(head['params'], epsilon, head['iteration'])
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


def test_bad_arguments_raise_before_any_work():
  key = jax.random.key(0)
  with pytest.raises(ValueError, match='right=0 must be positive'):
    search_epsilon(key, HEAD, X, Y, right=0)
  with pytest.raises(ValueError, match='one for each of the 30 features'):
    search_epsilon(key, HEAD, X, Y[:4])
  with pytest.raises(ValueError, match='at least 2 examples'):
    fit_max_margin(key, HEAD, X[:1], Y[:1])
  with pytest.raises(TypeError, match='rigth'):
    fit_max_margin(key, HEAD, X, Y, rigth=3.0)
