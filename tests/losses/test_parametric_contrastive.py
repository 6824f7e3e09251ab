import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_vectors import assert_close, golden

from jaxlab.losses.contrastive import normalize
from jaxlab.losses.parametric_contrastive import paco_loss

COUNTS = np.array([100, 40, 9, 1])


@pytest.fixture(params=['float32', 'float64'])
def rtol(request):
  """Runs a test in both precisions; the tolerance of each."""
  with jax.enable_x64(request.param == 'float64'):
    yield {'float32': 2e-6, 'float64': 1e-6}[request.param]


def arguments(seed=0, batch=8, others=8, dim=6):
  rng = np.random.default_rng(seed)
  features = normalize(rng.standard_normal((batch + others, dim)).astype(np.float32))
  labels = rng.integers(0, 4, batch + others)
  return features, labels, rng.standard_normal((batch, 4)).astype(np.float32)


def value_and_grad(**options):
  def loss(features, labels, logits, counts):
    return paco_loss(features, labels, logits, counts, **options)

  return jax.jit(jax.value_and_grad(loss, (0, 2)))


def agrees_with_reference(vectors, rtol):
  names = {'supt': 'supervised_temperature', 'smooth': 'smoothing'}
  options = {
    names.get(name, name): vectors.param(name)
    for name in ('alpha', 'beta', 'gamma', 'temperature', 'supt', 'smooth')
    if f'param_{name}' in vectors
  }
  value, grads = value_and_grad(**options)(
    vectors['in_features'],
    vectors['in_labels'],
    vectors['in_classifier_logits'],
    vectors['in_class_counts'],
  )
  # The reference's mask is float32, which costs its float64 values their last digits.
  assert_close(value, vectors['out_loss'], 1e-5)
  assert_close(grads[0], vectors['grad_features'], rtol)
  assert_close(grads[1], vectors['grad_classifier_logits'], rtol)


@golden('long_tail_protocols', 'paco_loss')
def test_paco_loss_and_gradients_agree_with_reference(vectors, rtol):
  agrees_with_reference(vectors, rtol)


@golden('long_tail_protocols', 'gpaco_loss')
def test_gpaco_loss_and_gradients_agree_with_reference(vectors, rtol):
  agrees_with_reference(vectors, rtol)


def by_hand(features, labels, logits, options):
  f, z = np.asarray(features, np.float64), np.asarray(logits, np.float64)
  alpha, beta, gamma, temperature, supervised_temperature, smoothing = options
  z = (z + np.log(COUNTS / COUNTS.sum())) / supervised_temperature
  losses = []
  for i, y in enumerate(labels[: len(z)]):
    others = [j for j in range(len(f)) if j != i]
    scores = {j: f[i] @ f[j] / temperature for j in others}
    log_normalizer = np.log(np.exp(z[i]).sum() + gamma * sum(np.exp(s) for s in scores.values()))
    weights, terms = [], []
    for c in range(4):
      weights.append(beta * (1 - smoothing if c == y else smoothing / 3))
      terms.append(log_normalizer - z[i, c])
    for j in others:
      weights.append(alpha * (labels[j] == y))
      terms.append(log_normalizer - scores[j])
    losses.append(np.average(terms, weights=weights))
  return np.mean(losses)


@pytest.mark.parametrize('seed', range(3))
def test_loss_weighs_centers_and_features_as_written(seed):
  features, labels, logits = arguments(seed)
  names = ('alpha', 'beta', 'gamma', 'temperature', 'supervised_temperature', 'smoothing')
  options = (0.3, 0.7, 0.4, 0.5, 2.0, 0.2)
  value, _ = value_and_grad(**dict(zip(names, options)))(features, labels, logits, COUNTS)
  assert_close(value, by_hand(features, labels, logits, options), 1e-5)


def test_without_features_it_is_the_balanced_softmax_and_without_prior_the_cross_entropy():
  features, labels, logits = arguments()
  loss = optax.softmax_cross_entropy_with_integer_labels
  step = value_and_grad(alpha=0.0, gamma=0.0, temperature=1.0)
  value, _ = step(features, labels, logits, None)
  assert_close(value, loss(logits, labels[:8]).mean(), 1e-5)
  value, _ = step(features, labels, logits, COUNTS)
  assert_close(value, loss(logits + np.log(COUNTS), labels[:8]).mean(), 1e-5)


def test_order_of_the_other_features_does_not_matter():
  features, labels, logits = arguments()
  order = np.concatenate([np.arange(8), 8 + np.random.default_rng(0).permutation(8)])
  step = value_and_grad()
  value, _ = step(features, labels, logits, COUNTS)
  assert_close(step(features[order], labels[order], logits, COUNTS)[0], value, 1e-6)


def test_gradients_are_finite_for_lonely_classes_zero_features_and_a_tiny_temperature():
  features, labels, logits = arguments()
  features = np.array(features)
  features[1], labels[0], labels[1:] = (
    0,
    3,
    labels[1:] % 3,
  )  # the first query has no positive feature
  value, grads = value_and_grad(temperature=1e-3, alpha=0.05)(features, labels, logits, COUNTS)
  assert np.isfinite(value)
  assert all(np.all(np.isfinite(grad)) for grad in grads)


@pytest.mark.exhaustive
def test_loss_agrees_eagerly_under_vmap_and_in_bfloat16():
  features, labels, logits = (np.stack(x) for x in zip(*[arguments(seed) for seed in range(3)]))

  def loss(*args):
    return paco_loss(*args, COUNTS, temperature=0.5)

  loop = np.stack([loss(*args) for args in zip(features, labels, logits)])
  assert_close(jax.jit(jax.vmap(loss))(features, labels, logits), loop, 1e-5)
  half = jax.jit(loss)(features[0].astype(jnp.bfloat16), labels[0], logits[0].astype(jnp.bfloat16))
  assert half.dtype == jnp.float32
  assert_close(half, loop[0], 2e-2)


def test_contrast_is_with_the_global_batch_on_any_number_of_devices():
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
  step = value_and_grad(alpha=0.05)
  one = step(*arguments(), COUNTS)
  many = step(*jax.device_put(arguments(), jax.NamedSharding(mesh, jax.P('data'))), COUNTS)
  assert_close(many[0], one[0], 1e-6)
  assert_close(many[1][0], one[1][0], 2e-6)
  assert_close(many[1][1], one[1][1], 2e-6)


F, Y, Z = arguments()


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: paco_loss(F[0], Y, Z), r'Expected features \[batch \+ others, dim\]'),
    (lambda: paco_loss(F, Y, Z[0]), r'Expected features \[batch \+ others, dim\]'),
    (lambda: paco_loss(F[:7], Y[:7], Z), 'at least the 8 rows'),
    (lambda: paco_loss(F, Y[1:], Z), 'a label for each row'),
    (lambda: paco_loss(F, Y * 0, Z[:, :1]), 'at least 2 classes'),
    (lambda: paco_loss(F, Y, Z[:0]), 'must have a row'),
    (lambda: paco_loss(F, Y + 4, Z), r'labels must be in \[0, 4\)'),
    (lambda: paco_loss(F, Y / 2, Z), 'labels must be integers'),
    (lambda: paco_loss(F, Y, Z, COUNTS[1:]), r'class_counts must be \[4\]'),
    (lambda: paco_loss(F, Y, Z, COUNTS - 1), 'got 0 for class 3'),
    (lambda: paco_loss(F, Y, Z, temperature=0), 'temperature must be positive'),
    (lambda: paco_loss(F, Y, Z, supervised_temperature=0), 'supervised_temperature must be'),
    (lambda: paco_loss(F, Y, Z, beta=0), 'beta must be positive'),
    (lambda: paco_loss(F, Y, Z, alpha=-1), 'alpha must not be negative'),
    (lambda: paco_loss(F, Y, Z, gamma=-1), 'gamma must not be negative'),
    (lambda: paco_loss(F, Y, Z, smoothing=2), r'smoothing must be in \[0, 1\]'),
  ],
)
def test_bad_arguments_raise(call, message):
  with pytest.raises(ValueError, match=message):
    call()
