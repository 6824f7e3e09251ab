import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_vectors import assert_close, golden
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab import losses


@pytest.fixture(params=['float32', 'float64'])
def rtol(request):
  """Runs a test in both precisions; the tolerance of each."""
  with jax.enable_x64(request.param == 'float64'):
    yield {'float32': 1e-5, 'float64': 1e-9}[request.param]


def features(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def value_and_grad(loss, argnums=0, **options):
  return jax.jit(jax.value_and_grad(functools.partial(loss, **options), argnums))


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@golden('ssl_baselines', 'simclr_nt_xent')
def test_nt_xent_and_gradient_agree_with_reference(vectors, rtol):
  step = value_and_grad(losses.nt_xent, (0, 1), temperature=vectors.param('temperature'))
  value, grads = step(vectors['in_z1'], vectors['in_z2'])
  assert_close(value, vectors['out_loss'], rtol)
  assert_close(grads[0], vectors['grad_z1'], rtol)
  assert_close(grads[1], vectors['grad_z2'], rtol)


@golden('ssql', 'losses')
def test_nt_xent_of_unit_rows_agrees_with_reference(vectors, rtol):
  temperature = vectors.param('temperature')
  step = value_and_grad(losses.nt_xent, (0, 1), temperature=temperature, normalized=True)
  value, grads = step(vectors['in_simclr_f1'], vectors['in_simclr_f2'])
  assert_close(value, vectors['out_loss_simclr'], rtol)
  assert_close(grads[0], vectors['grad_simclr_f1'], rtol)
  assert_close(grads[1], vectors['grad_simclr_f2'], rtol)


@golden('s3l', 'simclr_supcon_loss')
def test_two_views_drawn_to_each_other_agree_with_reference(vectors):
  def loss(z1, z2, multi_view):
    temperature, base = vectors.param('temperature'), vectors.param('base_temperature')
    if multi_view:
      return losses.multi_view_contrastive_loss([z1, z2], temperature, base, normalized=True)
    return temperature / base * losses.nt_xent(z1, z2, temperature, normalized=True)

  for multi_view in (True, False):
    step = value_and_grad(loss, (0, 1), multi_view=multi_view)
    value, grads = step(vectors['in_z1'], vectors['in_z2'])
    assert_close(value, vectors['out_loss'], 1e-5)
    assert_close(grads[0], vectors['grad_z1'], 1e-5)
    assert_close(grads[1], vectors['grad_z2'], 1e-5)


@golden('s3l', 'moco_v2_step')
def test_queue_loss_gradients_and_push_agree_with_a_whole_moco_step(vectors, rtol):
  temperature, momentum = vectors.param('temperature'), vectors.param('momentum')
  query_net = {name: vectors[f'param_q_{name}'] for name in ('w1', 'b1', 'w2', 'b2')}
  key_net = {name: vectors[f'param_k_{name}'] for name in query_net}

  def encode(net, x):
    hidden = jax.nn.relu(x @ net['w1'].T + net['b1'])
    return losses.normalize(hidden @ net['w2'].T + net['b2'])

  def loss(net, x, key, queue):
    return losses.info_nce_queue(encode(net, x), key, queue, temperature)

  @jax.jit
  def step(query_net, key_net, x_q, x_k, queue, pointer):
    key_net = optax.incremental_update(query_net, key_net, 1 - momentum)
    key = encode(key_net, x_k)
    values, grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(query_net, x_q, key, queue)
    return values, grads, key_net, losses.queue_push(queue, pointer, key)

  (value, logits), grads, key_net, (queue, pointer) = step(
    query_net,
    key_net,
    vectors['in_x_q'],
    vectors['in_x_k'],
    vectors['in_queue'],
    vectors['in_queue_ptr'],
  )
  assert_close(value, vectors['out_loss'], rtol)
  assert_close(logits, vectors['out_logits'], rtol)
  assert_close(grads[0]['w1'], vectors['grad_q_w1'], rtol)
  assert_close(grads[0]['w2'], vectors['grad_q_w2'], rtol)
  assert_close(grads[1], vectors['grad_x_q'], rtol)
  for name in ('w1', 'w2'):
    assert_close(key_net[name], vectors[f'out_k_{name}'], rtol)
  assert_close(queue, vectors['out_queue'], rtol)
  assert int(pointer) == vectors['out_queue_ptr']


nt_xent = jax.jit(functools.partial(losses.nt_xent, temperature=0.5))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 10))
def test_nt_xent_ignores_lengths_and_the_order_of_pairs(seed, factor):
  z1, z2 = features(seed, 4, 3), features(seed + 1, 4, 3)
  order = np.random.default_rng(seed).permutation(4)
  value = nt_xent(z1, z2)
  assert_close(nt_xent(np.float32(factor) * z1, z2), value, 1e-5)
  assert_close(nt_xent(z1[order], z2[order]), value, 1e-5)
  assert_close(nt_xent(z2, z1), value, 1e-5)


def test_every_view_is_drawn_to_all_others_of_its_image(rtol):
  views, temperature, base = [features(seed, 4, 3) for seed in range(3)], 0.5, 0.2
  z = unit(np.concatenate(views).astype(np.float64))
  image, s = np.tile(np.arange(4), 3), z @ z.T / temperature
  terms = []
  for i in range(12):
    others = np.arange(12) != i
    log_p = s[i] - np.log(np.exp(s[i][others]).sum())
    terms.append(-log_p[others & (image == image[i])].mean())
  value = losses.multi_view_contrastive_loss(views, temperature, base)
  assert_close(value, temperature / base * np.mean(terms), max(rtol, 1e-6))


@pytest.mark.parametrize(
  ('shapes', 'temperatures', 'message'),
  [
    ([(4, 3)], (0.1,), 'at least 2 views for a positive, got 1'),
    ([(1, 3), (1, 3)], (0.1,), 'at least 2 images for a negative, got a batch of 1'),
    ([(4, 3), (5, 3)], (0.1,), 'one shape'),
    ([(4, 3), (4, 3)], (0.1, 0.0), 'base_temperature'),
    ([(4, 3), (4, 3)], (0.0,), 'temperature'),
  ],
)
def test_views_without_positives_or_negatives_are_refused(shapes, temperatures, message):
  with pytest.raises(ValueError, match=message):
    losses.multi_view_contrastive_loss([np.ones(shape) for shape in shapes], *temperatures)


def test_nt_xent_falls_when_pairs_are_matched():
  z = features(0, 6, 8)
  assert nt_xent(z, z) < nt_xent(z, np.roll(z, 1, axis=0)) - 1


def test_nt_xent_is_finite_at_small_temperature_and_zero_vectors():
  z1, z2 = features(0, 4, 3), features(1, 4, 3)
  z1[1] = 0
  value, grad = value_and_grad(losses.nt_xent, temperature=1e-3)(z1, z2)
  assert np.isfinite(value)
  assert np.all(np.isfinite(grad))


def test_nt_xent_agrees_eagerly_under_vmap_and_in_bfloat16():
  z1, z2 = features(0, 3, 4, 5), features(1, 3, 4, 5)
  loop = [nt_xent(a, b) for a, b in zip(z1, z2)]
  assert_close(jax.jit(jax.vmap(losses.nt_xent))(z1, z2), loop, 1e-6)
  assert_close(losses.nt_xent(z1[0], z2[0], 0.5), loop[0], 1e-6)
  half = nt_xent(z1[0].astype(jnp.bfloat16), z2[0].astype(jnp.bfloat16))
  assert half.dtype == jnp.float32
  assert_close(half, loop[0], 1e-2)


def test_negatives_are_those_of_the_global_batch_on_any_number_of_devices():
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
  sharding = jax.NamedSharding(mesh, jax.P('data'))
  z1, z2 = features(0, 16, 4), features(1, 16, 4)
  step = value_and_grad(losses.nt_xent)
  one, many = step(z1, z2), step(*jax.device_put((z1, z2), sharding))
  assert_close(many[0], one[0], 1e-6)
  assert_close(many[1], one[1], 1e-6)


def test_normalize_gives_unit_vectors_of_the_same_dtype():
  x = features(0, 5, 7)
  assert_close(losses.normalize(x), unit(x), 1e-6)
  assert_close(losses.normalize(x, axis=0), unit(x.T).T, 1e-6)
  assert losses.normalize(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_normalize_has_a_finite_gradient_at_zero():
  grad = jax.jit(jax.grad(lambda x: jnp.sum(losses.normalize(x))))(np.zeros(3, np.float32))
  assert np.all(np.isfinite(grad))


def test_no_gradient_reaches_the_key_and_the_queue():
  query, key = unit(features(0, 2, 3)), unit(features(1, 2, 3))
  queue = unit(features(2, 4, 3)).T
  _, grads = value_and_grad(lambda *a: losses.info_nce_queue(*a)[0], (0, 1, 2))(query, key, queue)
  assert np.any(grads[0])
  assert not np.any(grads[1])
  assert not np.any(grads[2])


def test_queue_starts_with_unit_columns_at_position_zero():
  queue, pointer = losses.queue_init(jax.random.key(0), 5, 12)
  assert queue.shape == (5, 12)
  assert int(pointer) == 0
  assert_close(np.linalg.norm(queue, axis=0), np.ones(12), 1e-6)


@pytest.mark.parametrize('start', [0, 3])
def test_queue_holds_the_last_keys_after_any_number_of_pushes(start):
  queue, pointer = np.zeros((1, 6), np.float32), np.int32(start)
  push = jax.jit(losses.queue_push)
  for value in range(1, 6):
    queue, pointer = push(queue, pointer, np.full((2, 1), value, np.float32))
  assert sorted(queue[0].tolist()) == [3, 3, 4, 4, 5, 5]
  assert int(pointer) == (start + 10) % 6


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: losses.nt_xent(np.ones((1, 3)), np.ones((1, 3))), 'batch of 1'),
    (lambda: losses.nt_xent(np.ones((2, 3)), np.ones((2, 4))), 'one shape'),
    (lambda: losses.nt_xent(np.ones(3), np.ones(3)), '2 axes'),
    (lambda: losses.nt_xent(np.ones((2, 3)), np.ones((2, 3)), 0.0), 'temperature must be positive'),
    (
      lambda: losses.info_nce_queue(np.ones((2, 3)), np.ones((2, 3)), np.ones((3, 4)), -1.0),
      'temperature must be positive',
    ),
    (
      lambda: losses.info_nce_queue(np.ones((2, 3)), np.ones((2, 3)), np.ones((4, 3))),
      'dim = 3',
    ),
    (lambda: losses.queue_push(np.ones((3, 10)), 0, np.ones((4, 3))), 'choose 8'),
    (lambda: losses.queue_push(np.ones((3, 10)), 0, np.ones((5, 2))), 'keys'),
    (lambda: losses.queue_init(jax.random.key(0), 0, 4), 'dim must be positive'),
  ],
)
def test_bad_arguments_raise(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_supcon_is_that_of_float64_over_anchors_with_positives():
  z, labels = features(3, 7, 4), np.array([5, 2, 5, 9, 2, 2, -1])
  rows = np.float64(unit(z)) @ np.float64(unit(z)).T / 0.2
  anchors = []
  for i, label in enumerate(labels):
    others = [j for j in range(7) if j != i]
    own = [p for p in others if labels[p] == label]
    if own:
      total = np.log(sum(np.exp(rows[i, j]) for j in others))
      anchors.append(-np.mean([rows[i, p] - total for p in own]))
  assert len(anchors) == 5
  value, grad = value_and_grad(losses.supervised_contrastive_loss, temperature=0.2)(z, labels)
  assert_close(value, np.mean(anchors), 1e-5)
  assert np.isfinite(grad).all() and np.abs(grad).max(axis=1).min() > 1e-3
  normalized = losses.supervised_contrastive_loss(unit(z), labels, 0.2, normalized=True)
  assert_close(normalized, value, 1e-6)


def test_supcon_of_two_views_of_different_images_is_nt_xent():
  z1, z2 = features(4, 5, 3), features(5, 5, 3)
  labels = np.tile(np.arange(5), 2)
  supcon = losses.supervised_contrastive_loss(np.concatenate([z1, z2]), labels, 0.5)
  assert_close(supcon, losses.nt_xent(z1, z2, 0.5), 1e-6)


@pytest.mark.parametrize('batch', [1, 4])
def test_supcon_without_positives_is_zero_and_has_no_gradient(batch):
  z = features(6, batch, 3)
  value, grad = value_and_grad(losses.supervised_contrastive_loss)(z, np.arange(batch))
  assert value == 0
  np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize(
  'z, labels, temperature, message',
  [
    (np.zeros((3, 2)), np.zeros(2, int), 0.1, r'Expected z \[batch, dim\] and labels \[batch\]'),
    (np.zeros(3), np.zeros(3, int), 0.1, r'got \(3,\) and \(3,\)'),
    (np.zeros((3, 2)), np.zeros(3), 0.1, 'labels must be integers, got float'),
    (np.zeros((3, 2)), np.zeros(3, int), 0.0, 'temperature must be positive'),
  ],
)
def test_supcon_refuses_what_does_not_fit(z, labels, temperature, message):
  with pytest.raises(ValueError, match=message):
    losses.supervised_contrastive_loss(z, labels, temperature)
