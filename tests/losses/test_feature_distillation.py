import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.losses import feature_distillation_loss, mimic_loss, qfd_loss


def batch(seed=0):
  rng = np.random.default_rng(seed)
  student, teacher = rng.standard_normal((2, 8, 6)).astype(np.float32)
  return rng.standard_normal((8, 5)).astype(np.float32), rng.integers(0, 5, 8), student, teacher


def reference(logits, labels, student, teacher, weight):
  logits = np.asarray(logits, np.float64)
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  distance = np.mean((np.asarray(student, np.float64) - teacher) ** 2)
  return -np.mean(log_probs[np.arange(len(labels)), labels]) + weight * distance


@pytest.mark.parametrize('weight', [0.0, 0.5, 2.0])
def test_the_loss_is_the_formula_and_the_teacher_gets_no_gradient(weight):
  args = batch()
  (value, terms), grads = jax.jit(
    jax.value_and_grad(
      lambda y, s, t: qfd_loss(y, args[1], s, t, weight=weight), (0, 1, 2), has_aux=True
    )
  )(args[0], *args[2:])
  np.testing.assert_allclose(value, reference(*args, weight), rtol=1e-5)
  np.testing.assert_allclose(
    terms['cross_entropy'] + weight * terms['feature_distillation'], value, rtol=1e-6
  )
  np.testing.assert_allclose(
    grads[1], 2 * weight * (args[2] - args[3]) / args[2].size, rtol=1e-5, atol=1e-9
  )
  assert not np.any(grads[2])


def test_maps_and_half_precisions():
  rng = np.random.default_rng(1)
  student, teacher = rng.standard_normal((2, 3, 4, 4, 6)).astype(np.float32)
  each = feature_distillation_loss(student, teacher)
  assert each.shape == (3, 4, 4)
  np.testing.assert_allclose(each, ((student - teacher) ** 2).mean(-1), rtol=1e-5)
  mapped = jax.vmap(feature_distillation_loss)(student, teacher)
  np.testing.assert_allclose(mapped, each, rtol=1e-6)
  half = feature_distillation_loss(student.astype(jnp.bfloat16), teacher.astype(jnp.bfloat16))
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, each, rtol=0.05)


def test_bad_arguments_are_named():
  logits, labels, student, teacher = batch()
  with pytest.raises(ValueError, match=r'student_features \(8, 6\) and teacher_features \(8, 5\)'):
    qfd_loss(logits, labels, student, teacher[:, :5])
  with pytest.raises(ValueError, match='weight must not be negative, got -1'):
    qfd_loss(logits, labels, student, teacher, weight=-1)
  with pytest.raises(ValueError, match=r'labels must be in \[0, 5\)'):
    qfd_loss(logits, labels + 5, student, teacher)


def test_mimicking_is_the_mean_over_the_map_or_over_its_pooled_channels():
  rng = np.random.default_rng(0)
  student, teacher = rng.standard_normal((2, 3, 4, 5, 6)).astype(np.float32)
  expected = np.square(student - teacher).mean((1, 2, 3))
  np.testing.assert_allclose(mimic_loss(student, teacher), expected, rtol=1e-5)
  expected = np.square(student.mean((1, 2)) - teacher.mean((1, 2))).mean(1)
  np.testing.assert_allclose(mimic_loss(student, teacher, pooled=True), expected, rtol=1e-4)
  loss = lambda s, t: jnp.mean(mimic_loss(s, t, pooled=True))  # noqa: E731
  grads = jax.grad(loss, (0, 1))(student, teacher)
  # All places of a channel are pulled alike.
  assert np.ptp(grads[0], (1, 2)).max() < 1e-8 < np.abs(grads[0]).max() and not grads[1].any()
  half = mimic_loss(student.astype(jnp.bfloat16), teacher.astype(jnp.bfloat16))
  assert half.dtype == jnp.float32
  with pytest.raises(
    ValueError, match=r'student_map \(3, 4, 5, 6\) and teacher_map \(3, 2, 5, 6\)'
  ):
    mimic_loss(student, teacher[:, :2])
  with pytest.raises(ValueError, match='of one shape'):
    mimic_loss(student[0, 0], teacher[0, 0])
