import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_vectors import assert_close, golden
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab import parallel
from jaxlab.classifiers import (
  add_noise,
  feature_std,
  margin_head,
  noisy_accuracy,
  perturb_features,
  perturbed_loss,
  train_head,
)
from jaxlab.classifiers.noisy_head import initial_params
from jaxlab.models.classifier_heads import WeightNormHead

HEAD = margin_head(3)
OPTIONS = {'epochs': 3, 'batch_size': 4, 'learning_rate': 1.0}


def blobs(count=10, dim=5, classes=3, seed=0):
  """Unit features of three separable classes."""
  rng = np.random.default_rng(seed)
  labels = np.arange(count) % classes
  features = 3 * np.eye(classes, dim)[labels] + 0.3 * rng.standard_normal((count, dim))
  features /= np.linalg.norm(features, axis=1, keepdims=True)
  return features.astype(np.float32), labels.astype(np.int32)


X, Y = blobs()
PARAMS = initial_params(jax.random.key(1), HEAD, X)


@functools.cache
def compiled(**options):
  return jax.jit(lambda x, y: train_head(jax.random.key(0), HEAD, PARAMS, x, y, **options))


def train(features=X, **options):
  return compiled(**options)(features, Y)


def assert_params_close(actual, expected, rtol=1e-5):
  for name in expected:
    assert_close(actual[name], expected[name], rtol)


@golden('ibm2', 'perturbed_loss')
@pytest.mark.parametrize('dtype, rtol', [('float64', 1e-9), ('float32', 2e-6)])
def test_noise_objective_agrees_with_reference(vectors, dtype, rtol):
  with jax.enable_x64(dtype == 'float64'):
    x, noise, v, g = (
      jnp.asarray(vectors[name], dtype)
      for name in (
        'in_features',
        'in_noise',
        'param_weight_v_classes_by_features',
        'param_weight_g',
      )
    )
    labels = jnp.asarray(vectors['in_labels'])
    head = margin_head(len(v), vectors.param('scale'), vectors.param('norm_eps'))
    sigma = feature_std(x)
    assert_close(sigma, vectors['out_feature_std'], rtol)
    copies = add_noise(x, sigma, vectors.param('epsilon'), noise)
    assert copies.dtype == dtype
    flat = copies.reshape(-1, x.shape[1])
    assert_close(flat, vectors['out_perturbed_features'], rtol)

    @jax.jit
    def objective(params):
      loss = perturbed_loss(head, params, copies, labels, vectors.param('smoothing'))
      return jnp.mean(loss), head.apply({'params': params}, flat)

    (loss, logits), gradient = jax.value_and_grad(objective, has_aux=True)({'v': v, 'g': g})
    assert_close(logits, vectors['out_logits'], rtol)
    assert_close(loss, vectors['out_loss'], rtol)
    assert_close(gradient['v'], vectors['grad_weight_v'], rtol)
    assert_close(gradient['g'], vectors['grad_weight_g'], rtol)


def test_noise_has_the_deviation_of_its_channel_and_streams_by_example():
  sigma = jnp.array([0.0, 1.0, 3.0])
  x = jnp.array([[5.0, 6.0, 7.0], [1.0, 2.0, 3.0]])
  draw = jax.jit(lambda x, seed: perturb_features(jax.random.key(seed), x, sigma, 2.0, 4000))
  copies = draw(x, 0).reshape(2, 4000, 3)
  assert_close(jnp.std(copies, 1), jnp.broadcast_to(2 * sigma, (2, 3)), 0.05)
  assert_close(jnp.mean(copies, 1), x, 0.05)
  np.testing.assert_array_equal(copies[0, :, 0], 5.0)
  np.testing.assert_array_equal(draw(x[:1], 0), copies[0])
  assert not np.allclose(copies[0] - x[0], copies[1] - x[1])
  assert not np.allclose(copies[0], draw(x[:1], 1))


def test_no_gradient_reaches_the_features():
  copies = np.stack([X, 2 * X], 1)
  gradient = jax.jit(jax.grad(lambda c: jnp.sum(perturbed_loss(HEAD, PARAMS, c, Y))))(copies)
  np.testing.assert_array_equal(gradient, 0)


def test_training_is_adam_over_a_cosine_of_epochs():
  # One step an epoch, no noise: order does not matter.
  epochs, batch_size = 3, 32
  optimizer = optax.adam(optax.constant_schedule(1.0))
  params, state = PARAMS, optimizer.init(PARAMS)
  loss = jax.jit(jax.grad(lambda p: jnp.mean(perturbed_loss(HEAD, p, X[:, None], Y, 0.1))))
  for epoch in range(epochs):
    rate = 0.5 * batch_size / 256 * (1 + np.cos(np.pi * epoch / epochs)) / 2
    updates, state = optimizer.update(loss(params), state)
    params = jax.tree.map(lambda p, u, r=rate: p + r * u, params, updates)
  found = train(epochs=epochs, batch_size=batch_size, learning_rate=0.5)
  assert_params_close(found, params)


@pytest.mark.exhaustive
def test_copies_in_chunks_or_on_eight_devices_give_the_same_head():
  options = {**OPTIONS, 'epsilon': 1.0, 'num_copies': 3, 'batch_size': 8}
  whole = train(**options)
  assert_params_close(train(**options, chunk_size=3), whole, 1e-4)
  sharding = NamedSharding(parallel.make_mesh(), PartitionSpec('data'))
  assert_params_close(train(**options, sharding=sharding), whole, 1e-4)


@pytest.mark.exhaustive
def test_runs_mapped_at_once_are_those_of_a_loop():
  options = {**OPTIONS, 'num_copies': 2, 'epochs': 2}
  keys = jax.random.split(jax.random.key(3), 2)
  epsilons = jnp.array([0.5, 2.0])
  features = np.stack([X, blobs(seed=1)[0]])

  def one(key, x, epsilon):
    return train_head(key, HEAD, PARAMS, x, Y, epsilon=epsilon, **options)

  mapped = jax.jit(jax.vmap(one))(keys, features, epsilons)
  alone = jax.jit(one)
  for i in range(2):
    assert_params_close(
      jax.tree.map(lambda a, i=i: a[i], mapped), alone(keys[i], features[i], epsilons[i]), 1e-4
    )


def test_every_example_is_seen_once_an_epoch():
  # A weightless filling row, or a lost one, would show in the sum of the gradients' signs.
  class Tally(WeightNormHead):
    pass

  seen = []
  original = Tally.__call__

  def spy(self, x, train=False):
    jax.debug.callback(lambda a: seen.append(np.asarray(a)), x)
    return original(self, x, train)

  Tally.__call__ = spy
  params = initial_params(jax.random.key(0), HEAD, X)
  out = train_head(
    jax.random.key(0), Tally(3, 10.0, 1e-5), params, X, Y, epochs=1, batch_size=4, learning_rate=1.0
  )
  jax.block_until_ready(out)
  jax.effects_barrier()
  rows = np.concatenate([a.reshape(-1, X.shape[1]) for a in seen])
  counts = (rows[:, None] == X).all(-1).sum(0)
  assert counts.min() >= 1
  assert counts.sum() == 12  # three batches of 4; the filling repeats the first example
  assert np.delete(counts, 0).max() == 1


def test_noisy_accuracy_counts_all_copies_whatever_the_chunks():
  params = train(**OPTIONS)
  options = {'epsilon': 3.0, 'num_copies': 7}
  key, sigma = jax.random.key(5), feature_std(X)

  @jax.jit
  def accuracies(params):
    predictions = HEAD.apply({'params': params}, perturb_features(key, X, sigma, 3.0, 7)).argmax(-1)
    expected = jnp.mean(predictions == np.repeat(Y, 7))
    accuracy = functools.partial(noisy_accuracy, key, HEAD, params)
    return expected, {
      'chunks': [accuracy(X, Y, **options, chunk_size=size) for size in (3, 256)],
      'clean': accuracy(X, Y),
      'one': accuracy(X[:1], Y[:1], sigma=sigma, **options),
    }

  expected, found = accuracies(params)
  assert 0.1 < expected < 1
  assert_close(found['chunks'], [expected] * 2, 1e-6)
  assert float(found['clean']) > 0.9
  assert 0 <= float(found['one']) <= 1


@pytest.mark.parametrize('chunk_size', [3, 256])
def test_noisy_accuracy_of_a_head_that_is_not_finite_is_nan(chunk_size):
  params = jax.jit(HEAD.init)(jax.random.key(0), X)['params']
  broken = jax.tree.map(lambda leaf: leaf.at[..., 0].set(jnp.nan), params)
  options = {'num_copies': 2, 'epsilon': 1.0, 'chunk_size': chunk_size}
  found = [noisy_accuracy(jax.random.key(1), HEAD, p, X, Y, **options) for p in (params, broken)]
  assert 0 <= found[0] <= 1 and np.isnan(found[1])


def test_constant_channels_get_no_noise_and_bfloat16_features_compute_in_float32():
  x = X.copy()
  x[:, 2] = 0.25
  np.testing.assert_array_equal(
    perturb_features(jax.random.key(0), x, feature_std(x), 5.0, 3)[:, 2], 0.25
  )
  params = train(features=jnp.asarray(x, jnp.bfloat16), epsilon=1.0, **OPTIONS)
  assert params['v'].dtype == jnp.float32
  assert np.isfinite(params['v']).all()


def test_zero_features_train_to_finite_heads():
  params = train(features=np.zeros_like(X), **OPTIONS)
  assert all(np.isfinite(leaf).all() for leaf in params.values())


def nan_at_4():
  x = X.copy()
  x[4, 1] = np.nan
  return x


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'features': X[:1], 'labels': Y[:1]}, 'at least 2 examples'),
    ({'features': X[0]}, r'must be \[examples, dim\]'),
    ({'labels': Y[:3]}, r'one for each of the 10 features; got int32 \(3,\)'),
    ({'labels': Y.astype(np.float32)}, 'labels must be integers'),
    ({'labels': Y - 1}, r'labels must be in \[0, 3\), got values from -1 to 1'),
    ({'labels': jnp.asarray(Y + 1)}, r'labels must be in \[0, 3\), got values from 1 to 3'),
    ({'features': nan_at_4()}, '1 of 10 features hold NaN or infinity, the first at position 4'),
    ({'num_copies': 0}, 'num_copies=0 must be at least 1'),
    ({'epochs': 0}, 'epochs=0'),
    ({'batch_size': 0}, 'batch_size=0'),
    ({'chunk_size': -1}, 'chunk_size=-1'),
  ],
)
def test_bad_arguments_raise(changes, message):
  given = {'features': X, 'labels': Y, **changes}
  with pytest.raises(ValueError, match=message):
    train_head(jax.random.key(0), HEAD, PARAMS, given.pop('features'), given.pop('labels'), **given)


def test_examples_that_a_program_closes_over_are_checked_and_give_the_same_head():
  x, y, wrong = jnp.asarray(X), jnp.asarray(Y), jnp.asarray(Y + 1)

  @jax.jit
  def fit(key):
    params = train_head(key, HEAD, PARAMS, x, y, **OPTIONS)
    return params, noisy_accuracy(key, HEAD, params, x, y, epsilon=1.0, num_copies=2)

  params, accuracy = fit(jax.random.key(0))
  assert_params_close(params, train(**OPTIONS))
  assert 0 <= float(accuracy) <= 1
  for judge in (train_head, noisy_accuracy):
    with pytest.raises(ValueError, match=r'labels must be in \[0, 3\)'):
      jax.jit(lambda key, judge=judge: judge(key, HEAD, PARAMS, x, wrong))(jax.random.key(0))


def test_one_class_and_one_example_raise():
  with pytest.raises(ValueError, match='a margin lies between two classes'):
    margin_head(1)
  with pytest.raises(ValueError, match=r'at least 2 examples, got \(1, 5\)'):
    feature_std(X[:1])
  with pytest.raises(ValueError, match='num_copies=0'):
    perturb_features(jax.random.key(0), X, feature_std(X), 1.0, 0)
