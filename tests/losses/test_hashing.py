"""Losses on bits by hyperplanes: parity, what they see of a direction, merged layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab import losses

RNG = np.random.default_rng(0)


def random(*shape):
  return RNG.normal(size=shape).astype(np.float32)


@golden('feature_mimicking', 'lsh_losses')
@pytest.mark.parametrize('kind', ['lsh', 'lshl2', 'lsh_l1', 'lsh_l2', 'lsh_s', 'lshl2_s'])
def test_losses_and_biases_agree_with_official_code(vectors, kind):
  weight, features = vectors['param_hash_weight'], vectors['in_bias_features']
  bias = losses.hyperplane_bias(weight, features)
  assert_close(bias, vectors['out_bias_median'])
  assert_close(
    losses.hyperplane_bias(weight, features, 'mean'), vectors['out_bias_mean'], 1e-5, 1e-6
  )
  teacher = vectors['in_teacher_feature']

  def loss(student):
    if kind.startswith('lshl2'):
      values = losses.lsh_l2_loss(student, teacher, weight, bias)
    else:
      form = {'lsh_l1': 'l1', 'lsh_l2': 'l2'}.get(kind, 'bce')
      values = losses.lsh_loss(student, teacher, weight, bias, kind=form)
    if kind.endswith('_s'):
      return losses.mean_where_right(values, vectors['in_teacher_logits'], vectors['in_labels'])
    return jnp.mean(values)

  value, gradient = jax.jit(jax.value_and_grad(loss))(vectors['in_student_feature'])
  assert_close(value, vectors[f'out_loss_{kind}'])
  assert_close(gradient, vectors[f'grad_student_feature_{kind}'], 2e-5)


@golden('feature_mimicking', 'kd_and_l2')
def test_distillation_and_distances_agree_with_official_code(vectors):
  temperature = vectors.param('temperature')
  student, teacher = vectors['in_student_feature'], vectors['in_teacher_feature']

  def distilled(logits):
    return jnp.mean(losses.distillation_loss(logits, vectors['in_teacher_logits'], temperature))

  def distance(features):
    return jnp.mean(losses.feature_distillation_loss(features, teacher))

  def direction(features):
    unit = losses.normalize(features), losses.normalize(jnp.asarray(teacher))
    return jnp.mean(losses.feature_distillation_loss(*unit))

  for loss, given, out, grad in (
    (distilled, vectors['in_student_logits'], 'out_kd_loss', 'grad_student_logits'),
    (distance, student, 'out_l2_loss', 'grad_l2'),
    (direction, student, 'out_l2_normalized_loss', 'grad_l2_normalized'),
  ):
    value, gradient = jax.jit(jax.value_and_grad(loss))(given)
    assert_close(value, vectors[out])
    assert_close(gradient, vectors[grad], 2e-5)


def test_bits_see_the_direction_alone_and_differ_by_the_angle():
  weight = losses.draw_hyperplanes(jax.random.key(0), 6, 4000, 0.3)
  assert abs(float(jnp.std(weight)) - 0.3) < 0.01
  x, y = random(6), random(6)
  bits = losses.hash_values(np.stack([x, 7 * x, y]), weight) > 0
  np.testing.assert_array_equal(bits[0], bits[1])
  angle = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
  assert abs(float(jnp.mean(bits[0] != bits[2])) - angle / np.pi) < 0.03


def test_stored_bits_are_what_the_loss_takes_of_the_teacher_itself():
  weight = losses.draw_hyperplanes(jax.random.key(0), 6, 21, 0.3)
  student, teacher, bias = random(5, 6), random(5, 6), random(21)
  bits = losses.hash_bits(teacher, weight, bias)
  assert bits.shape == (5, 3) and bits.dtype == jnp.uint8

  def stored(student):
    return jnp.mean(losses.stored_lsh_loss(student, bits, weight, bias))

  def asked(student):
    return jnp.mean(losses.lsh_loss(student, teacher, weight, bias))

  pairs = zip(*(jax.jit(jax.value_and_grad(own))(student) for own in (stored, asked)), strict=True)
  for a, b in pairs:
    assert_close(a, b, 1e-6)


def test_no_teacher_that_is_right_gives_no_loss_and_no_gradient():
  logits, labels = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.array([1, 1])
  value, gradient = jax.value_and_grad(losses.mean_where_right)(jnp.ones(2), logits, labels)
  assert float(value) == 0 and not gradient.any()


def test_two_linear_layers_are_one():
  k1, b1, k2, b2 = random(5, 7), random(7), random(7, 3), random(3)
  x = random(4, 5)
  kernel, bias = losses.merge_linear(k1, b1, k2, b2)
  assert_close(x @ kernel + bias, (x @ k1 + b1) @ k2 + b2, 1e-5)


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda f: losses.lsh_loss(f, f[:, :3], jnp.ones((4, 5))), 'by a linear layer'),
    (lambda f: losses.lsh_loss(f, f, jnp.ones((4, 3))), r'weight must be \[count, dim\]'),
    (lambda f: losses.lsh_loss(f, f, jnp.ones((4, 5)), jnp.ones(3)), r'bias must be \(4,\)'),
    (lambda f: losses.lsh_loss(f, f, jnp.ones((4, 5)), kind='mse'), "kind is 'mse'"),
    (lambda f: losses.hyperplane_bias(jnp.ones((4, 5)), f * jnp.nan), 'not finite'),
    (lambda f: losses.hyperplane_bias(jnp.ones((4, 5)), f, 'zero'), "kind is 'zero'"),
    (
      lambda f: losses.stored_lsh_loss(f, jnp.ones((2, 4), jnp.uint8), jnp.ones((4, 5))),
      'bits must',
    ),
    (lambda f: losses.hash_bits(f * jnp.nan, jnp.ones((4, 5))), 'not finite'),
    (lambda f: losses.draw_hyperplanes(jax.random.key(0), 5, 4, 0.0), 'std must be positive'),
    (lambda f: losses.merge_linear(f, None, f, None), 'do not chain'),
  ],
)
def test_what_does_not_fit_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(jnp.asarray(random(2, 5)))
