from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab import losses

BATCH, CLASSES = 12, 4


def both(logits1, logits2, labels, drop_rate, **options):
  """Returns the losses, their gradients by the logits of all, and the selection of `peer_learning_loss`."""

  def total(logits1, logits2):
    found = losses.peer_learning_loss(logits1, logits2, labels, drop_rate, **options)
    return found.loss1 + found.loss2, found

  (_, found), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(logits1, logits2)
  return found, gradients


@golden('peer_learning', 'peer_learning_loss')
def test_peer_learning_and_gradients_agree_with_official_code(vectors):
  arrays = (jnp.asarray(vectors[f'in_logits_{i}'], jnp.float32) for i in (1, 2))
  found, gradients = both(*arrays, vectors['in_labels'], vectors.param('drop_rate'))
  for i in (1, 2):
    assert_close(found[i - 1], vectors[f'out_loss_{i}'], 2e-6)
    assert_close(gradients[i - 1], vectors[f'grad_logits_{i}'], 5e-6)
  np.testing.assert_array_equal(found.aux.agree, vectors['out_agree_mask'])


@pytest.fixture(scope='module')
def case():
  rng = np.random.default_rng(0)
  logits = 2 * rng.normal(size=(2, BATCH, CLASSES))
  logits[1, :7] += 3 * logits[0, :7]  # so that networks agree on some examples
  return *logits.astype(np.float32), rng.integers(0, CLASSES, BATCH)


def reference(logits1, logits2, labels, drop_rate):
  """Returns cross-entropies, agreement, and small-loss sets of the agreement and of the whole batch."""
  entropies = []
  for logits in (logits1, logits2):
    z = logits.astype(np.float64)
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    entropies.append(-log_p[np.arange(BATCH), labels])
  agree = logits1.argmax(1) == logits2.argmax(1)

  def smallest(own, among):
    rows = np.flatnonzero(among)
    count = int((1 - drop_rate) * len(rows))
    return np.isin(np.arange(BATCH), rows[np.argsort(own[rows])[:count]])

  kept = [smallest(own, agree) for own in entropies]
  kept_of_all = [smallest(own, np.ones(BATCH, bool)) for own in entropies]
  return entropies, agree, kept, kept_of_all


@pytest.mark.parametrize(
  'name',
  ['peer', 'agreement', 'disagreement', 'decoupling', 'co_teaching', 'small_loss'],
)
def test_each_network_learns_from_its_own_set(case, name):
  (ce1, ce2), agree, (s1, s2), (all1, all2) = reference(*case, 0.4)
  expected = {
    'peer': (~agree | s2, ~agree | s1), 'agreement': (s2, s1), 'disagreement': (~agree, ~agree),
    'decoupling': (~agree, ~agree), 'co_teaching': (all2, all1), 'small_loss': (all1, all2),
  }[name]  # fmt: skip
  assert agree.any() and (~agree).any() and (s1 != s2).any()
  if name == 'decoupling':
    found = losses.decoupling_loss(*case, 0.4)
  elif name in ('co_teaching', 'small_loss'):
    found = losses.co_teaching_loss(*case, 0.4, exchange=name == 'co_teaching')
  else:
    found = losses.peer_learning_loss(*case, 0.4, name)
  np.testing.assert_array_equal(found.aux.update1, expected[0])
  np.testing.assert_array_equal(found.aux.update2, expected[1])
  assert_close(found.loss1, ce1[expected[0]].mean(), 1e-5)
  assert_close(found.loss2, ce2[expected[1]].mean(), 1e-5)


def test_a_loss_is_of_its_own_network_alone(case):
  logits1, logits2, labels = case
  for loss in (losses.peer_learning_loss, losses.co_teaching_loss, losses.decoupling_loss):
    for index, of in ((0, 1), (1, 0)):
      one = jax.grad(lambda *z, loss=loss, index=index: loss(*z, labels, 0.3)[index], (0, 1))
      gradients = one(logits1, logits2)
      assert np.any(gradients[index]) and not np.any(gradients[of])


def test_how_many_are_kept_is_exact():
  count = jax.jit(jax.vmap(
    lambda rate, agreeing: jnp.sum(
      losses.peer_learning_loss(
        jnp.zeros((300, 2)),
        jnp.where(jnp.arange(300) < agreeing, 0.0, 1.0)[:, None] * jnp.array([0.0, 1.0]),
        jnp.zeros(300, int), rate,
      ).aux.keep1
    ),
    (None, 0),
  ))  # fmt: skip
  sizes = np.arange(301)
  for percent in range(0, 100, 5):
    expected = [int((1 - Fraction(percent, 100)) * int(n)) for n in sizes]
    np.testing.assert_array_equal(count(percent / 100, sizes), expected)


def test_a_loss_over_nothing_is_zero_with_zero_gradients(case):
  logits, _, labels = case
  for mode, drop_rate in (('disagreement', 0.0), ('peer', 0.99)):
    found, gradients = both(logits[:3], logits[:3], labels[:3], drop_rate, mode=mode)
    assert found.aux.agree.all() and not found.aux.update1.any()
    assert float(found.loss1) == float(found.loss2) == 0
    assert not np.any(gradients[0]) and not np.any(gradients[1])
  opposed = losses.peer_learning_loss(logits, -logits, labels, 0.5)
  assert not opposed.aux.agree.any() and opposed.aux.update1.all() and opposed.aux.update2.all()


def test_it_works_in_jit_vmap_and_bfloat16(case):
  logits1, logits2, labels = case
  plain = losses.peer_learning_loss(*case, 0.25)
  batched = jax.jit(jax.vmap(losses.peer_learning_loss, (0, 0, None, 0)))(
    np.stack([logits1, logits1]), np.stack([logits2, logits2]), labels, np.array([0.25, 0.0])
  )
  assert_close([own[0] for own in batched[:2]], plain[:2], 1e-6)
  narrow = losses.peer_learning_loss(
    jnp.asarray(logits1, jnp.bfloat16), jnp.asarray(logits2, jnp.bfloat16), labels, 0.0
  )
  assert narrow.loss1.dtype == jnp.float32
  assert_close(narrow[:2], losses.peer_learning_loss(*case, 0.0)[:2], 0.02)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'logits2': np.zeros((BATCH, 5))}, 'one shape'),
    ({'labels': np.full(BATCH, 4)}, r'labels must be in \[0, 4\)'),
    ({'drop_rate': 1.0}, r'drop_rate must be in \[0, 1\), got 1.0'),
    ({'drop_rate': -0.1}, 'drop_rate must be in'),
    ({'drop_rate': np.zeros(2)}, r'scalar, got the shape \(2,\)'),
    ({'mode': 'decoupling'}, "mode is 'decoupling'"),
  ],
)
def test_what_does_not_fit_is_named(case, change, message):
  given = {**dict(zip(('logits1', 'logits2', 'labels'), case)), 'drop_rate': 0.3, **change}
  with pytest.raises(ValueError, match=message):
    losses.peer_learning_loss(**given)
