import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab.losses import (
  coordinate_system,
  fit_principal_components,
  num_components,
  pca_mimicking_loss,
)


@golden('gplq', 'pca_mimic_loss')
@pytest.mark.parametrize('x64', [True, False])
def test_components_loss_and_gradient_agree_with_reference(vectors, x64):
  rtol = 1e-9 if x64 else 5e-6
  count = vectors['hp_components'].item()
  with jax.enable_x64(x64):
    features, teacher, student = (
      jnp.asarray(vectors[name], float)
      for name in ('in_teacher_features', 'in_batch_teacher', 'in_batch_student')
    )
    fitted = fit_principal_components(features, count)
    assert_close(fitted.mean, vectors['out_mean'], rtol)
    assert_close(fitted.variance, vectors['out_explained_variance'], rtol)
    shares = fitted.variance / fitted.variance.sum()
    assert_close(shares, vectors['out_explained_variance_ratio'], rtol)
    assert_close(fitted.components @ fitted.components.T, vectors['out_projector'], rtol)

    def loss(student, teacher):
      return pca_mimicking_loss(student, teacher, fitted.mean, fitted.components).mean()

    value, (grad, none) = jax.jit(jax.value_and_grad(loss, (0, 1)))(student, teacher)
    assert_close(value, vectors['out_loss_pca'], rtol)
    assert_close(grad, vectors['grad_batch_student'], rtol)
    assert not np.any(none)


def features(n=50, dim=12, rank=12, seed=0):
  rng = np.random.default_rng(seed)
  return (rng.standard_normal((n, rank)) @ rng.standard_normal((rank, dim)) + 5).astype(np.float32)


def test_only_the_subspace_counts_and_the_mean_cancels():
  fitted = fit_principal_components(features(), 4)
  teacher = features(7, seed=1)
  away = np.eye(12) - fitted.components @ fitted.components.T
  student = teacher + 3 * np.random.default_rng(2).standard_normal((7, 12)) @ away
  assert np.all(pca_mimicking_loss(student, teacher, fitted.mean, fitted.components) < 1e-6)
  other = teacher + fitted.components[:, 1]
  np.testing.assert_allclose(
    pca_mimicking_loss(other, teacher, 9 + fitted.mean, fitted.components), np.ones(7), rtol=1e-4
  )
  grads = jax.grad(lambda *a: pca_mimicking_loss(*a).sum(), (1, 2, 3))(other, teacher, *fitted[:2])
  assert not any(np.any(g) for g in grads)


def test_transformations_agree():
  fitted = fit_principal_components(features(), 4)
  student, teacher = features(8, seed=1), features(8, seed=2)
  each = pca_mimicking_loss(student, teacher, *fitted[:2])
  mapped = jax.vmap(lambda s, t: pca_mimicking_loss(s, t, *fitted[:2]))(student, teacher)
  np.testing.assert_allclose(mapped, each, rtol=1e-4)
  half = pca_mimicking_loss(student.astype(jnp.bfloat16), teacher.astype(jnp.bfloat16), *fitted[:2])
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, each, rtol=0.1)
  traced = jax.jit(lambda f: fit_principal_components(f, 4))(features())
  np.testing.assert_allclose(traced.variance, fitted.variance, rtol=1e-4, atol=1e-4)


def test_the_number_of_components_explains_a_share_and_is_rounded_up():
  variance = np.array([40.0, 20, 10, 10, 10, 5, 5])
  assert num_components(variance, multiple=1) == 2
  assert num_components(variance, 0.61, multiple=1) == 3
  assert num_components(variance, 1.0, multiple=1) == 7
  assert (
    num_components(variance, multiple=4) == 4 and num_components(variance, 0.9, multiple=4) == 7
  )
  assert fit_principal_components(features(), multiple=8).components.shape == (12, 8)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda f: fit_principal_components(f, 13), r'count=13.*\(12, 50\)'),
    (lambda f: fit_principal_components(f[:5], 6), r'count=6.*\(12, 5\)'),
    (lambda f: fit_principal_components(f[0], 2), r'must be \[examples, dim\]'),
    (lambda f: fit_principal_components(f * np.nan, 2), 'must be finite'),
    (lambda f: num_components([1.0], share=0.0), r'share must be in \(0, 1\]'),
    (lambda f: num_components([1.0], multiple=0), 'multiple must be positive'),
    (lambda f: num_components([0.0, 0.0]), 'not all 0'),
    (lambda f: pca_mimicking_loss(f, f[:, :5], f[0], np.eye(12)), r'\(50, 12\), \(50, 5\)'),
    (lambda f: pca_mimicking_loss(f, f, f[0, :5], np.eye(12)), r'mean \[dim\]'),
    (lambda f: pca_mimicking_loss(f, f, f[0], np.eye(5)), r'components \[dim, count\]'),
  ],
)
def test_bad_arguments_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call(features())


def test_too_few_dimensions_are_warned_of():
  with pytest.warns(RuntimeWarning, match='span 3 dimensions: of 5 components 2 are arbitrary'):
    fit_principal_components(features(rank=3) - 5, 5)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    fit_principal_components(features(rank=3) - 5, 3)


def test_axes_have_a_sign_and_few_examples_have_few_of_them():
  rng = np.random.default_rng(0)
  for shape, axes in (((30, 6), 6), ((4, 6), 3), ((6, 6), 5)):
    found = coordinate_system(rng.normal(size=shape))
    assert found.components.shape == (6, axes) and found.variance.shape == (axes,)
    largest = np.abs(found.components).argmax(0)
    assert np.all(found.components[largest, range(axes)] > 0)
    np.testing.assert_allclose(found.components.T @ found.components, np.eye(axes), atol=1e-9)
  constant = rng.normal(size=(30, 6)) * [1, 1, 0, 1, 1, 1]
  assert coordinate_system(constant).components.shape == (6, 5)
  np.testing.assert_allclose(coordinate_system(constant).components[2], np.zeros(5), atol=1e-12)


@pytest.mark.parametrize(
  'features, count, message',
  [
    (np.ones((1, 3)), None, 'two examples or more'),
    (np.array([[1.0], [np.nan], [np.inf]]), None, '2 rows are not finite, the first is row 1'),
    (np.ones((5, 3)), None, 'the same in all 5 rows'),
    (np.eye(3), 3, 'have 1 to 2 axes'),
    (np.eye(3), 0, 'count=0'),
  ],
)
def test_features_without_axes_are_refused(features, count, message):
  with pytest.raises(ValueError, match=message):
    coordinate_system(features, count)
