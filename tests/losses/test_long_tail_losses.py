import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_vectors import assert_close, golden
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.losses import long_tail

COUNTS = np.array([200, 60, 20, 7, 1])


@pytest.fixture(params=['float32', 'float64'])
def rtol(request):
  """Runs a test in both precisions; the tolerance of each."""
  with jax.enable_x64(request.param == 'float64'):
    yield {'float32': 2e-6, 'float64': 1e-9}[request.param]


def batch(seed=0, size=8, num_classes=5):
  rng = np.random.default_rng(seed)
  logits = (2 * rng.standard_normal((size, num_classes))).astype(np.float32)
  return logits, rng.integers(0, num_classes, size)


def mean_and_grad(loss, **options):
  def mean(*args, mask=None):
    return jnp.mean(loss(*args, **options) if mask is None else loss(*args, mask=mask, **options))

  return jax.jit(jax.value_and_grad(mean))


@golden('long_tail_protocols', 'class_balanced_weights')
def test_class_balanced_weights_agree_with_reference(vectors):
  weights = long_tail.class_balanced_weights(vectors['in_class_counts'], vectors.param('beta'))
  assert weights.dtype == np.float64
  assert_close(weights, vectors['out_weights'], 1e-9)


@golden('long_tail_protocols', 'ldam_loss')
def test_ldam_margins_loss_and_gradient_agree_with_reference(vectors, rtol):
  counts, max_margin = vectors['in_class_counts'], vectors.param('max_margin')
  assert_close(long_tail.ldam_margins(counts, max_margin), vectors['out_margins'], rtol)
  step = mean_and_grad(long_tail.ldam_loss, max_margin=max_margin, scale=vectors.param('scale'))
  value, grad = step(
    vectors['in_cosine_logits'], vectors['in_labels'], counts, vectors['in_class_weights']
  )
  assert_close(value, vectors['out_loss'], rtol)
  assert_close(grad, vectors['grad_cosine_logits'], rtol)


@golden('long_tail_protocols', 'balanced_softmax_loss')
def test_balanced_softmax_and_gradient_agree_with_reference(vectors, rtol):
  step = mean_and_grad(long_tail.balanced_softmax_loss)
  value, grad = step(vectors['in_logits'], vectors['in_labels'], vectors['in_class_counts'])
  assert_close(value, vectors['out_loss'], rtol)
  assert_close(grad, vectors['grad_logits'], rtol)


@golden('long_tail_protocols', 'logit_adjustment')
def test_logit_adjustment_in_training_and_post_hoc_agrees_with_reference(vectors, rtol):
  logits, counts, tau = vectors['in_logits'], vectors['in_class_counts'], vectors.param('tau')
  step = mean_and_grad(long_tail.logit_adjusted_loss, tau=tau)
  value, grad = step(logits, vectors['in_labels'], counts)
  assert_close(value, vectors['out_train_loss'], rtol)
  assert_close(grad, vectors['grad_logits'], rtol)
  adjusted = long_tail.adjust_logits(logits, counts, tau)
  assert_close(adjusted, vectors['out_posthoc_logits'], rtol)


@golden('long_tail_protocols', 'label_aware_smoothing')
def test_label_aware_smoothing_and_its_loss_agree_with_reference(vectors, rtol):
  smoothing = long_tail.label_aware_smoothing(
    vectors['in_class_counts'],
    vectors.param('smooth_head'),
    vectors.param('smooth_tail'),
    vectors.path.stem.split('_')[3],
  )
  # The reference keeps this table in float32.
  assert_close(smoothing, vectors['out_smoothing_per_class'], 0, atol=1e-7)
  step = mean_and_grad(long_tail.label_aware_smoothing_loss)
  value, grad = step(vectors['in_logits'], vectors['in_labels'], smoothing)
  assert_close(value, vectors['out_loss'], max(rtol, 1e-7))
  assert_close(grad, vectors['grad_logits'], max(rtol, 1e-7))


@golden('gml', 'gml_loss')
def test_gml_loss_gradient_recalls_and_probabilities_agree_with_reference(vectors, rtol):
  logits, labels, counts = (vectors[f'in_{name}'] for name in ('logits', 'labels', 'class_counts'))
  loss = functools.partial(long_tail.gml_loss, power=vectors.param('p'))
  classes = labels == np.arange(len(counts))[:, None]
  rows = np.eye(len(labels), dtype=bool)

  @jax.jit
  def step(logits):
    # Of one class alone, and of one example alone, the loss is minus the log of what the reference lists.
    parts = jax.lax.map(lambda mask: jnp.exp(-loss(logits, labels, counts, mask=mask)), masks)
    return *jax.value_and_grad(loss)(logits, labels, counts), parts

  masks = np.concatenate([classes, rows])
  value, grad, parts = step(logits)
  recalls, probs = parts[: len(counts)], parts[len(counts) :]
  assert_close(value, vectors['out_loss'], rtol)
  assert_close(grad, vectors['grad_logits'], rtol)
  # The loss is what is accurate to `rtol`; its exponential loses as much as the exponent is large.
  present = vectors['out_class_present']
  assert_close(recalls[present], vectors['out_class_mean_prob'][present], 20 * rtol)
  np.testing.assert_array_equal(recalls[~present], 1)
  assert_close(probs, vectors['out_reweighted_prob_true_class'], 20 * rtol)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=8), st.floats(0, 0.99999))
def test_class_balanced_weights_have_mean_one_and_fall_with_the_count(counts, beta):
  weights = long_tail.class_balanced_weights(counts, beta)
  assert_close(weights.mean(), 1.0, 1e-12)
  assert np.all(np.diff(weights[np.argsort(counts)]) <= 1e-9)
  if beta == 0:
    np.testing.assert_array_equal(weights, 1)


def test_deferred_weights_start_at_their_epoch_also_under_tracing():
  expected = long_tail.class_balanced_weights(COUNTS)
  for epoch, weights in [(0, np.ones(5)), (159, np.ones(5)), (160, expected), (199, expected)]:
    assert_close(long_tail.deferred_class_weights(COUNTS, epoch), weights, 0)
    traced = jax.jit(lambda e: long_tail.deferred_class_weights(COUNTS, e))(epoch)
    assert_close(traced, weights, 1e-6)
  assert isinstance(long_tail.deferred_class_weights(COUNTS, 160), np.ndarray)


def test_ldam_gives_the_smallest_class_the_largest_margin_and_weights_all_alike_by_default():
  margins = long_tail.ldam_margins(COUNTS, 0.3)
  assert np.all(np.diff(margins) > 0)
  assert_close(margins[-1], 0.3, 1e-6)
  logits, labels = batch()
  cosines = np.tanh(logits)
  without = long_tail.ldam_loss(cosines, labels, COUNTS)
  assert_close(without, long_tail.ldam_loss(cosines, labels, COUNTS, np.full(5, 2.0)), 1e-6)
  shifted = cosines - np.asarray(long_tail.ldam_margins(COUNTS)) * np.eye(5)[labels]
  plain = optax.softmax_cross_entropy_with_integer_labels(30 * shifted, labels)
  assert_close(without, plain.mean(), 1e-5)


logit_adjusted_loss = jax.jit(long_tail.logit_adjusted_loss)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_logit_adjustment_of_tau_one_is_balanced_softmax_and_of_zero_cross_entropy(seed):
  logits, labels = batch(seed)
  balanced = long_tail.balanced_softmax_loss(logits, labels, COUNTS)
  assert_close(logit_adjusted_loss(logits, labels, COUNTS, 1), balanced, 1e-5)
  plain = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  assert_close(logit_adjusted_loss(logits, labels, COUNTS, 0), plain, 1e-6)


def test_adjusted_logits_undo_the_adjustment_of_training():
  logits, _ = batch()
  trained = logits + 0.7 * np.log(COUNTS / COUNTS.sum())
  assert_close(long_tail.adjust_logits(trained, COUNTS, 0.7), logits, 1e-5)


def test_balanced_softmax_of_equal_counts_is_the_cross_entropy():
  logits, labels = batch()
  plain = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  assert_close(long_tail.balanced_softmax_loss(logits, labels, np.full(5, 37)), plain, 1e-6)


@pytest.mark.parametrize('shape', ['concave', 'linear', 'convex'])
def test_label_aware_smoothing_goes_from_tail_to_head(shape):
  smoothing = long_tail.label_aware_smoothing(COUNTS, 0.4, 0.1, shape)
  assert_close(smoothing[[0, -1]], [0.4, 0.1], 1e-12)
  assert np.all(np.diff(smoothing) < 0)
  middle = long_tail.label_aware_smoothing([1, 2, 3], 0.4, 0.1, shape)[1] - 0.25
  assert {'concave': middle > 0.01, 'linear': abs(middle) < 1e-12, 'convex': middle < -0.01}[shape]


def gml_by_hand(logits, labels, power=1.0, floor=1e-5):
  with_counts = COUNTS * np.exp(np.asarray(logits, np.float64))
  probs = with_counts / with_counts.sum(-1, keepdims=True)
  own = np.maximum(probs[np.arange(len(labels)), labels], floor)
  surprise = [-np.log(own[labels == c].mean()) for c in np.unique(labels)]
  return np.mean(np.power(surprise, power)) ** (1 / power)


gml_loss = jax.jit(long_tail.gml_loss)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(1, 8), st.floats(0.1, 20))
def test_gml_counts_classes_of_the_batch_only(seed, power, spread):
  logits, labels = batch(seed)
  logits *= np.float32(spread)
  value = gml_loss(logits, labels, COUNTS, power=power)
  assert_close(value, gml_by_hand(logits, labels, power), 1e-4, atol=1e-6)
  assert 0 <= value <= -np.log(1e-5) * 1.0001


def test_gml_with_one_example_per_class_is_the_balanced_softmax_loss():
  logits, _ = batch(3, size=5)
  labels = np.array([4, 1, 0, 2, 3])
  value, grad = mean_and_grad(long_tail.gml_loss)(logits, labels, COUNTS)
  expected = mean_and_grad(long_tail.balanced_softmax_loss)(logits, labels, COUNTS)
  assert_close(value, expected[0], 1e-5)
  assert_close(grad, expected[1], 1e-5)


@pytest.mark.parametrize('power', [1.0, 1.5, 2.0])
def test_gml_gradient_is_finite_for_perfect_classes_and_recalls_of_zero(power):
  step = mean_and_grad(long_tail.gml_loss, power=power)
  labels = np.array([0, 0, 3, 3])
  perfect = 300 * np.eye(5, dtype=np.float32)[labels]
  value, grad = step(perfect, labels, COUNTS)
  assert value == 0
  np.testing.assert_array_equal(grad, 0)
  hopeless = 300 * np.eye(5, dtype=np.float32)[(labels + 1) % 5]
  value, grad = step(hopeless, labels, COUNTS)
  assert_close(value, -np.log(1e-5), 1e-5)
  np.testing.assert_array_equal(grad, 0)
  mixed = np.where(np.array([True, True, False, False])[:, None], perfect, 0)
  value, grad = step(mixed, labels, COUNTS)
  assert np.isfinite(value)
  assert np.all(np.isfinite(grad))
  assert np.any(grad[2:])


def test_padding_reaches_neither_the_value_nor_the_gradient_of_gml():
  logits, labels = batch()
  expected = mean_and_grad(long_tail.gml_loss)(logits[:5], labels[:5], COUNTS)
  mask = np.arange(8) < 5
  logits[5:], labels[5:] = np.inf, -1
  logits[6] = np.nan
  assert_close(long_tail.gml_loss(logits, labels, COUNTS, mask=mask), expected[0], 1e-6)
  step = mean_and_grad(long_tail.gml_loss)
  value, grad = step(logits, labels, COUNTS, mask=mask)
  assert_close(value, expected[0], 1e-6)
  assert_close(grad[:5], expected[1], 1e-6)
  np.testing.assert_array_equal(grad[5:], 0)
  value, grad = step(logits, labels, COUNTS, mask=np.zeros(8, bool))
  assert value == 0
  np.testing.assert_array_equal(grad, 0)


def test_gml_batch_is_the_global_one_on_any_number_of_devices():
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
  logits, labels = batch(size=16)
  mask = np.arange(16) < 13
  step = mean_and_grad(long_tail.gml_loss, power=2.0)
  sharded = jax.device_put((logits, labels), jax.NamedSharding(mesh, jax.P('data')))
  one = step(logits, labels, COUNTS, mask=mask)
  many = step(*sharded, COUNTS, mask=mask)
  assert_close(many[0], one[0], 1e-6)
  assert_close(many[1], one[1], 1e-6)


def test_a_compiled_program_may_close_over_scalars_that_are_arrays():
  logits, labels = batch()
  one, half, share = (jnp.float32(value) for value in (1, 0.5, 1e-5))

  @jax.jit
  def losses(z):
    return (
      long_tail.gml_loss(z, labels, COUNTS, power=one, prob_floor=share),
      long_tail.ldam_loss(z, labels, COUNTS, max_margin=half, scale=one),
      long_tail.ensemble_probabilities(z, z, one, one),
    )

  gml, _, probs = losses(logits)
  assert_close(gml, long_tail.gml_loss(logits, labels, COUNTS), 1e-5)
  assert_close(probs, jax.nn.softmax(logits), 1e-6)
  for options in ({'power': jnp.float32(0.5)}, {'prob_floor': jnp.float32(1.0)}):
    with pytest.raises(ValueError, match='must be'):
      jax.jit(lambda z, o=options: long_tail.gml_loss(z, labels, COUNTS, **o))(logits)


def test_ensemble_is_a_mean_of_tempered_probabilities():
  new, old = batch(0)[0], batch(1)[0]
  probs = long_tail.ensemble_probabilities(new, old, 2.0, 0.5)
  assert_close(probs, (jax.nn.softmax(new / 2) + jax.nn.softmax(old * 2)) / 2, 1e-6)
  assert_close(jnp.sum(probs, -1), np.ones(8), 1e-6)
  assert_close(long_tail.ensemble_probabilities(new, new), jax.nn.softmax(new), 1e-6)


LOSSES = {
  'ldam': lambda z, y: long_tail.ldam_loss(jnp.tanh(z), y, COUNTS, np.arange(1, 6)),
  'balanced_softmax': lambda z, y: long_tail.balanced_softmax_loss(z, y, COUNTS),
  'logit_adjusted': lambda z, y: long_tail.logit_adjusted_loss(z, y, COUNTS, 0.5),
  'smoothing': lambda z, y: long_tail.label_aware_smoothing_loss(z, y, np.linspace(0.4, 0, 5)),
  'gml': lambda z, y: long_tail.gml_loss(z, y, COUNTS, power=2.0),
}


@pytest.mark.parametrize('name', LOSSES)
def test_losses_agree_compiled_under_vmap_and_in_bfloat16(name):
  loss = LOSSES[name]
  logits, labels = (np.stack(x) for x in zip(*[batch(seed) for seed in range(3)]))
  loop = np.stack([loss(a, b) for a, b in zip(logits, labels)])
  assert_close(jax.jit(jax.vmap(loss))(logits, labels), loop, 1e-5)
  half = jax.jit(loss)(jnp.asarray(logits[0], jnp.bfloat16), labels[0])
  assert half.dtype == jnp.float32
  assert_close(half, loop[0], 3e-2)


@pytest.mark.parametrize('name', LOSSES)
def test_gradients_are_finite_at_extreme_logits_and_nan_is_not_hidden(name):
  logits, labels = batch()
  grad = jax.jit(jax.grad(lambda z: jnp.mean(LOSSES[name](z, labels))))
  assert np.all(np.isfinite(grad(1e3 * logits)))
  logits[2] = np.nan
  assert np.isnan(jnp.mean(LOSSES[name](logits, labels)))


Z, Y = batch()


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: long_tail.class_balanced_weights([3, 0]), 'got 0 for class 1: leave out classes'),
    (lambda: long_tail.class_balanced_weights([3.5, 1]), 'positive integers, got 3.5 for class 0'),
    (lambda: long_tail.class_balanced_weights([np.nan, 1]), 'positive integers, got nan'),
    (lambda: long_tail.class_balanced_weights([]), r'class_counts must be \[num_classes\], got'),
    (lambda: long_tail.class_balanced_weights([3, 1], 1.0), r'beta must be in \[0, 1\), got 1.0'),
    (lambda: long_tail.deferred_class_weights([3, -1], 0), 'got -1 for class 1'),
    (lambda: long_tail.ldam_margins([3, 1], 0.0), 'max_margin must be positive'),
    (lambda: long_tail.ldam_margins([3, 0]), 'got 0 for class 1'),
    (lambda: long_tail.ldam_loss(Z, Y, COUNTS, scale=0), 'scale must be positive'),
    (lambda: long_tail.ldam_loss(Z, Y, COUNTS, np.ones(4)), r'class_weights must be \(5,\)'),
    (lambda: long_tail.ldam_loss(Z, Y, COUNTS[1:]), r'class_counts must be \[5\] like the logits'),
    (lambda: long_tail.ldam_loss(Z, Y + 5, COUNTS), r'labels must be in \[0, 5\)'),
    (lambda: long_tail.balanced_softmax_loss(Z, Y[1:], COUNTS), 'Expected logits'),
    (lambda: long_tail.balanced_softmax_loss(Z, Y, COUNTS - 1), 'got 0 for class 4'),
    (lambda: long_tail.balanced_softmax_loss(Z, Y - 5, COUNTS), r'labels must be in \[0, 5\)'),
    (lambda: long_tail.logit_adjusted_loss(Z, Y / 2, COUNTS), 'labels must be integers'),
    (lambda: long_tail.logit_adjusted_loss(Z, Y, COUNTS - 1), 'got 0 for class 4'),
    (lambda: long_tail.adjust_logits(Z, COUNTS[1:]), r'class_counts must be \[5\]'),
    (lambda: long_tail.adjust_logits(1.0, COUNTS), 'a feature axis'),
    (lambda: long_tail.label_aware_smoothing([5, 5], 0.4, 0.1), 'got 5 for every class: use'),
    (lambda: long_tail.label_aware_smoothing([5, 1], 1.4, 0.1), r'head must be in \[0, 1\]'),
    (lambda: long_tail.label_aware_smoothing([5, 1], 0.4, -1), r'tail must be in \[0, 1\]'),
    (lambda: long_tail.label_aware_smoothing([5, 1], 0.4, 0.1, 'steep'), "got 'steep'"),
    (lambda: long_tail.label_aware_smoothing([5, 0], 0.4, 0.1), 'got 0 for class 1'),
    (lambda: long_tail.label_aware_smoothing_loss(Z, Y, 0.1), r'smoothing must be \(5,\)'),
    (lambda: long_tail.label_aware_smoothing_loss(Z, Y, np.full(5, 2)), r'must be in \[0, 1\]'),
    (lambda: long_tail.gml_loss(Z, Y, COUNTS, power=0.5), 'power must be at least 1, got 0.5'),
    (lambda: long_tail.gml_loss(Z, Y, COUNTS, prob_floor=0), r'prob_floor must be in \(0, 1\)'),
    (lambda: long_tail.gml_loss(Z, Y, COUNTS, mask=np.ones(7)), r'mask must be \(8,\)'),
    (lambda: long_tail.gml_loss(Z, Y + 5, COUNTS, mask=np.ones(8)), r'labels must be in \[0, 5\)'),
    (lambda: long_tail.gml_loss(Z[:0], Y[:0], COUNTS), 'not empty'),
    (lambda: long_tail.gml_loss(Z[0], Y[0], COUNTS), r'logits must be \[batch, num_classes\]'),
    (lambda: long_tail.gml_loss(Z, Y, COUNTS - 1), 'got 0 for class 4'),
    (lambda: long_tail.ensemble_probabilities(Z, Z[1:]), 'one shape'),
    (lambda: long_tail.ensemble_probabilities(Z, Z, 0.0), 't_new must be positive'),
    (lambda: long_tail.ensemble_probabilities(Z, Z, 1.0, -1), 't_old must be positive'),
  ],
)
def test_bad_arguments_raise(call, message):
  with pytest.raises(ValueError, match=message):
    call()
