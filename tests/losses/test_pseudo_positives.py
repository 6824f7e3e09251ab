import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab import losses


@golden('mls', 'mls_loss')
def test_labels_and_losses_agree_with_the_reference(vectors):
  temperature, weight = vectors.param('temperature'), vectors.param('lambda')
  labels = losses.top_k_pseudo_labels(vectors['in_g1'], vectors['in_queue_g'].T, vectors.param('k'))
  np.testing.assert_array_equal(labels, vectors['out_pseudo_labels'])
  queue = vectors['in_queue_z'].T

  def bce(z):
    return losses.multi_label_queue_loss(z, queue, labels, temperature)

  def nce(z):
    query, key = losses.normalize(z), vectors['in_key_z2_normalized']
    return losses.info_nce_queue(query, key, queue, temperature)[0]

  z = vectors['in_z1']
  value, gradient = jax.jit(jax.value_and_grad(bce))(z)
  assert_close(value, vectors['out_bce'], 2e-6)
  assert_close(gradient, vectors['grad_z1_bce'], 5e-6)
  value, gradient = jax.jit(jax.value_and_grad(lambda z: nce(z) + weight * bce(z)))(z)
  assert_close(nce(z), vectors['out_infonce'], 2e-6)
  assert_close(value, vectors['out_total'], 2e-6)
  assert_close(gradient, vectors['grad_z1_total'], 5e-6)
  cosines = losses.normalize(z) @ queue
  assert_close(cosines, vectors['out_logits_before_temperature'], 2e-6)


def test_positives_alone_leave_out_the_negatives():
  rng = np.random.default_rng(0)
  z, queue = rng.normal(size=(3, 4)), rng.normal(size=(4, 6))
  labels = (rng.random((3, 6)) < 0.4).astype(float)
  x = z / np.linalg.norm(z, axis=1, keepdims=True) @ queue / 0.2
  expected = np.mean(labels * np.log1p(np.exp(-x)))
  found = losses.multi_label_queue_loss(z, queue, labels, positives_only=True)
  assert_close(found, expected, 1e-5)
  all_terms = expected + np.mean((1 - labels) * np.log1p(np.exp(x)))
  assert_close(losses.multi_label_queue_loss(z, queue, labels), all_terms, 1e-5)


def test_each_neighbor_is_told_from_all_that_are_none():
  rng = np.random.default_rng(1)
  z, queue = rng.normal(size=(3, 4)), rng.normal(size=(4, 6))
  labels = np.array([[1, 0, 1, 0, 0, 0], [0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]])
  x = z / np.linalg.norm(z, axis=1, keepdims=True) @ queue / 0.3
  terms = []
  for row, own in zip(np.exp(x), labels, strict=True):
    others = row[own == 0].sum()
    terms.append(np.mean([-np.log(row[i] / (row[i] + others)) for i in np.flatnonzero(own)]))
  found, gradient = jax.value_and_grad(losses.neighbor_queue_loss)(
    jnp.asarray(z), queue, labels, 0.3
  )
  assert_close(found, np.mean(terms), 1e-5)
  assert np.all(np.isfinite(gradient)) and np.any(gradient)


def test_queues_are_written_at_one_place():
  a, b = jnp.zeros((2, 4)), jnp.zeros((1, 4), jnp.int32)
  keys = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[7], [8]])
  (a, b), pointer = losses.queues_push((a, b), 2, keys)
  (a, b), pointer = losses.queues_push((a, b), pointer, [10 * key for key in keys])
  assert a.tolist() == [[10, 30, 1, 3], [20, 40, 2, 4]] and b.tolist() == [[70, 80, 7, 8]]
  assert int(pointer) == 2 and b.dtype == jnp.int32


def test_labels_and_queue_get_no_gradient():
  z, queue = jnp.ones((2, 3)), jnp.eye(3, 4)

  def loss(features, queue):
    labels = losses.top_k_pseudo_labels(features, queue, 2)
    return losses.multi_label_queue_loss(z, queue, labels)

  for gradient in jax.grad(loss, (0, 1))(z, queue):
    assert not np.any(gradient)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: losses.top_k_pseudo_labels(jnp.ones((2, 3)), jnp.ones((3, 4)), 5), 'k is 5'),
    (lambda: losses.top_k_pseudo_labels(jnp.ones((2, 3)), jnp.ones((3, 4)), 0), 'k is 0'),
    (lambda: losses.top_k_pseudo_labels(jnp.ones((2, 3)), jnp.ones((2, 4)), 1), 'queue'),
    (
      lambda: losses.multi_label_queue_loss(jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones((2, 3))),
      'labels',
    ),
    (
      lambda: losses.neighbor_queue_loss(jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones((2, 5))),
      'labels',
    ),
    (
      lambda: losses.queues_push([jnp.ones((2, 4)), jnp.ones((2, 6))], 0, [jnp.ones((2, 2))] * 2),
      'one size',
    ),
    (
      lambda: losses.multi_label_queue_loss(
        jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.ones((2, 4)), -1
      ),
      'temperature',
    ),
  ],
)
def test_impossible_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
