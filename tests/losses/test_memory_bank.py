import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab import losses
from jaxlab.training import schedules


@golden('efficient_ssl', 'sqrt_kl')
def test_sqrt_kl_and_gradients_agree_with_official_code(vectors):
  power = vectors.param('power')
  for name, options in (
    ('kl_p_u', {}),
    ('kl_u_p', {'direction': 'u_p'}),
    ('kl_p_u_no_stop_gradient', {'stop_gradient': False}),
  ):
    step = jax.value_and_grad(lambda x, own=options: losses.sqrt_kl(x, power, **own))
    value, gradient = step(vectors['in_logits'])
    assert_close(value, vectors[f'out_{name}'], 5e-6)
    assert_close(gradient, vectors[f'grad_{name}'], 5e-6)


@golden('efficient_ssl', 'single_branch_step')
def test_single_branch_step_agrees_with_official_code(vectors):
  columns = np.concatenate([vectors['in_labels'], vectors['in_negative_ids']])
  temperature, momentum = vectors.param('temperature'), vectors.param('bank_momentum')
  options = {'kl_weight': vectors.param('lambda_kl'), 'power': vectors.param('power')}

  def value(features):
    found = losses.memory_bank_loss(features, vectors['in_bank'], columns, temperature, **options)
    return found.loss, found

  (loss, found), gradient = jax.value_and_grad(value, has_aux=True)(vectors['in_features'])
  assert_close(loss, vectors['out_loss'], 5e-6)
  assert_close(found.cross_entropy, vectors['out_ce'], 5e-6)
  assert_close(found.kl, vectors['out_kl'], 2e-5)
  assert_close(found.cosines, vectors['out_cosine_logits'], 5e-6)
  assert_close(gradient, vectors['grad_features'], 5e-6)
  bank = losses.bank_update_ema(
    vectors['in_bank'], vectors['in_labels'], vectors['in_features'], momentum
  )
  assert_close(bank, vectors['out_bank'], 5e-6)


@golden('efficient_ssl', 'lr_schedule')
def test_learning_rates_agree_with_official_code(vectors):
  epochs, warmup = vectors.param('epochs'), vectors.param('warmup_epochs')
  schedule = schedules.cosine(vectors.param('lr'), epochs, warmup_steps=warmup)
  assert_close([schedule(epoch) for epoch in range(epochs)], vectors['out_lr'], 5e-6)


@pytest.fixture(scope='module')
def case():
  rng = np.random.default_rng(0)
  bank = rng.normal(size=(11, 5))
  bank /= np.linalg.norm(bank, axis=1, keepdims=True)
  return rng.normal(size=(3, 5)), bank, np.array([4, 9, 0])


def test_the_gradient_is_that_of_the_entropy():
  logits = np.random.default_rng(1).normal(size=(4, 6))
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  entropy = -(p * np.log(p)).sum(1, keepdims=True)
  for power in (0.5, 0.2):
    expected = (1 - power) * p * (np.log(p) + entropy) / 4
    assert_close(jax.grad(losses.sqrt_kl)(logits, power), expected, 1e-5)
  assert abs(float(losses.sqrt_kl(logits, 1.0))) < 1e-6


def test_what_is_not_there_changes_nothing(case):
  features, bank, ids = case
  own = np.concatenate([ids, [1, 2, 7]])
  more, where = np.concatenate([own, [9, 4]]), np.array([True] * 6 + [False] * 2)

  def loss(features, columns, where):
    return losses.memory_bank_loss(features, bank, columns, where=where).loss

  expected = jax.jit(jax.value_and_grad(loss))(features, own, None)
  found = jax.jit(jax.value_and_grad(loss))(features, more, where)
  for a, b in zip(found, expected):
    assert_close(a, b, 1e-5)


def test_mixed_images_are_both_of_them(case):
  features, bank, ids = case
  partners = np.array([2, 0, 1])
  found = losses.memory_bank_loss(features, bank, ids, 0.3, partners=partners, share=0.7)
  z = features / np.linalg.norm(features, axis=1, keepdims=True)
  logits = z @ bank[ids].T / 0.3
  log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  rows = np.arange(3)
  expected = -np.mean(0.7 * log_p[rows, rows] + 0.3 * log_p[rows, partners])
  assert_close(found.cross_entropy, expected, 1e-5)


def test_columns_are_the_batch_and_negatives_outside_of_it():
  ids = jnp.array([3, 5])
  columns, where = jax.jit(losses.sample_columns, static_argnums=(2, 3))(
    jax.random.key(0), ids, 6, 8
  )
  assert columns[:2].tolist() == [3, 5] and where[:2].all()
  assert len({*columns[2:].tolist()}) == 6
  assert where[2:].tolist() == [c not in (3, 5) for c in columns[2:].tolist()]
  with pytest.raises(ValueError, match='count is 9, expected 0 to 8'):
    losses.sample_columns(jax.random.key(0), ids, 9, 8)


def test_rows_stay_of_unit_length_and_others_as_they_were(case):
  features, bank, ids = case
  new = losses.bank_update_ema(bank, ids, features, 0.5)
  np.testing.assert_allclose(np.linalg.norm(new, axis=1), 1, rtol=1e-6)
  others = np.setdiff1d(np.arange(11), ids)
  np.testing.assert_array_equal(new[others], bank[others].astype(np.float32))


def test_a_bank_begins_with_the_last_features_of_every_image(case):
  features, _, ids = case
  later = np.random.default_rng(3).normal(size=(2, 5))
  bank = losses.bank_init(jnp.zeros((11, 5)), [(ids, features), (np.array([9, 2]), later)])
  expected = np.zeros((11, 5))
  expected[ids] = features
  expected[[9, 2]] = later
  norms = np.linalg.norm(expected, axis=1, keepdims=True)
  assert_close(bank, expected / np.where(norms > 0, norms, 1), 1e-6)
  with pytest.raises(ValueError, match='a row twice'):
    losses.bank_init(jnp.zeros((11, 5)), [(np.array([9, 9]), later)])
  with pytest.raises(ValueError, match='ids must lie in 0 to 4'):
    losses.bank_init(jnp.zeros((5, 5)), [(np.array([1, 5]), later)])


def test_all_rows_are_compared_where_as_many_are_drawn():
  columns, where = losses.sample_columns(jax.random.key(0), jnp.array([3, 5]), 8, 8)
  assert columns.tolist() == [3, 5, *range(8)]
  assert where.tolist() == [True, True, *(row not in (3, 5) for row in range(8))]


def test_the_update_by_the_gradient_reaches_all_compared_rows(case):
  features, bank, ids = case
  columns, where = np.concatenate([ids, [1, 9, 7]]), np.array([True] * 4 + [False, True])
  cosines = losses.memory_bank_loss(features, bank, columns, where=where).cosines
  new = losses.bank_update_gradient(bank, columns, features, cosines, 0.2, 0.6, where=where)
  z = features / np.linalg.norm(features, axis=1, keepdims=True)
  compared = columns[where]
  p = np.exp(z @ bank[compared].T / 0.2)
  p /= p.sum(1, keepdims=True)
  expected = bank.copy()
  expected[compared] = 0.6 * bank[compared] + 0.4 * (np.eye(3, 5) - p).T @ z
  expected /= np.linalg.norm(expected, axis=1, keepdims=True)
  assert_close(new, expected, 1e-5)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: losses.sqrt_kl(jnp.ones((2, 3)), 0), 'power'),
    (lambda: losses.sqrt_kl(jnp.ones((2, 3)), direction='p'), "direction is 'p'"),
    (lambda: losses.memory_bank_loss(jnp.ones((2, 3)), jnp.ones((5, 4)), jnp.arange(3)), 'bank'),
    (lambda: losses.memory_bank_loss(jnp.ones((2, 3)), jnp.ones((5, 3)), jnp.arange(1)), 'columns'),
    (lambda: losses.memory_bank_loss(jnp.ones((2, 3)), jnp.ones((5, 3)), jnp.arange(2), 0), 'temp'),
    (lambda: losses.bank_update_ema(jnp.ones((5, 3)), jnp.arange(2), jnp.ones((2, 3)), 2), 'momen'),
    (
      lambda: losses.bank_update_ema(jnp.ones((5, 3)), [0, 5], jnp.ones((2, 3))),
      'ids must lie in 0 to 4',
    ),
    (lambda: losses.bank_update_ema(jnp.ones((5, 3)), [1, 1], jnp.ones((2, 3))), 'a row twice'),
    (lambda: losses.bank_update_ema(jnp.ones((5, 3)), [0, 1], jnp.ones((2, 1))), 'bank'),
    (lambda: losses.memory_bank_loss(jnp.ones((2, 3)), jnp.ones((5, 3)), [0, 1, 7]), 'got 0 to 7'),
    (
      lambda: losses.memory_bank_loss(jnp.ones((2, 3)), jnp.ones((5, 3)), [0, 1], partners=[0, 2]),
      'partners must lie in 0 to 1',
    ),
  ],
)
def test_impossible_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
