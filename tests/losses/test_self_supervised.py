import functools

import jax
import jax.numpy as jnp
import numpy as np
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


def inputs(vectors, *names):
  return [vectors[f'in_{name}'] for name in names]


@golden('ssl_baselines', 'simsiam_loss')
def test_simsiam_loss_and_gradient_agree_with_reference(vectors, rtol):
  arguments = inputs(vectors, 'p1', 'p2', 'z1', 'z2')
  value, grads = value_and_grad(losses.simsiam_loss, (0, 1, 2, 3))(*arguments)
  assert_close(value, vectors['out_loss'], rtol, atol=0.1 * rtol)
  assert_close(grads[0], vectors['grad_p1'], rtol)
  assert_close(grads[1], vectors['grad_p2'], rtol)
  assert not np.any(grads[2])
  assert not np.any(grads[3])


@golden('s3l', 'byol_loss')
def test_byol_loss_and_gradient_agree_with_reference(vectors, rtol):
  arguments = inputs(vectors, 'p1', 'p2', 'z1', 'z2')
  value, grads = value_and_grad(losses.byol_loss, (0, 1, 2, 3))(*arguments)
  assert_close(value, vectors['out_loss'], rtol)
  assert_close(grads[0], vectors['grad_p1'], rtol)
  assert_close(grads[1], vectors['grad_p2'], rtol)
  assert not np.any(grads[2])
  assert not np.any(grads[3])


@golden('ssql', 'losses')
def test_ssql_loss_and_gradient_agree_with_reference(vectors, rtol):
  names = ('p1', 'p2', 'p1_quant', 'p2_quant', 'z1', 'z2')
  arguments = inputs(vectors, *names)
  value, grads = value_and_grad(losses.ssql_loss, range(6))(*arguments)
  assert_close(value, vectors['out_loss_ssql'], rtol, atol=0.1 * rtol)
  for name, grad in zip(names[:4], grads):
    assert_close(grad, vectors[f'grad_{name}'], rtol)
  assert not np.any(grads[4])
  assert not np.any(grads[5])
  plain = jax.jit(losses.simsiam_loss)(*inputs(vectors, 'p1', 'p2', 'z1', 'z2'))
  assert_close(plain, vectors['out_loss_simsiam'], rtol, atol=0.1 * rtol)


@golden('ssl_baselines', 'dino_loss')
def test_dino_loss_gradient_center_and_temperature_agree_with_reference(vectors, rtol):
  student, teacher, center = inputs(vectors, 'student_logits', 'teacher_logits', 'center')
  temperature = jax.jit(
    functools.partial(
      losses.dino_teacher_temperature,
      warmup_temperature=vectors.param('warmup_teacher_temp'),
      temperature=vectors.param('teacher_temp'),
      warmup_epochs=vectors.param('warmup_teacher_temp_epochs'),
    )
  )
  epochs = np.arange(vectors.param('num_epochs'))
  assert_close(temperature(epochs), vectors['out_teacher_temp_schedule'], rtol)
  step = value_and_grad(
    losses.dino_loss,
    (0, 1),
    num_crops=vectors.param('num_crops'),
    student_temperature=vectors.param('student_temp'),
  )
  now = temperature(vectors.param('epoch'))
  value, grads = step(student, teacher, center, teacher_temperature=now)
  crops = vectors.param('num_crops'), 2
  by_crop = [x.reshape(n, -1, x.shape[-1]) for x, n in zip((student, teacher), crops, strict=True)]
  assert_close(step(*by_crop, center, teacher_temperature=now)[0], value, rtol)
  assert_close(value, vectors['out_loss'], rtol)
  assert_close(grads[0], vectors['grad_student_logits'], rtol)
  assert not np.any(grads[1])
  center = jax.jit(losses.dino_center_update)(center, teacher, vectors.param('center_momentum'))
  assert_close(center, vectors['out_center'], rtol)


@golden('ssl_baselines', 'barlow_twins_loss')
def test_barlow_twins_loss_and_gradient_agree_with_reference(vectors, rtol):
  z1, z2 = inputs(vectors, 'z1', 'z2')
  weight, epsilon = vectors.param('lambda'), vectors.param('bn_eps')
  step = value_and_grad(losses.barlow_twins_loss, (0, 1), redundancy_weight=weight, epsilon=epsilon)
  value, grads = step(z1, z2)
  assert_close(value, vectors['out_loss'], rtol)
  assert_close(grads[0], vectors['grad_z1'], rtol)
  assert_close(grads[1], vectors['grad_z2'], rtol)
  correlation = jax.jit(losses.cross_correlation)(z1, z2, epsilon)
  assert_close(correlation, vectors['out_cross_correlation'], rtol)
  parts = vectors['out_on_diag'], vectors['out_off_diag']
  assert_close(jax.jit(losses.barlow_twins_loss)(z1, z2, 0.0, epsilon), parts[0], rtol)
  assert_close(jax.jit(losses.barlow_twins_loss)(z1, z2, 1.0, epsilon), sum(parts), rtol)


cosine = jax.jit(losses.negative_cosine_similarity)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 10))
def test_cosine_ignores_lengths_and_is_minus_one_at_the_target(seed, factor):
  p, z = features(seed, 3, 4), features(seed + 1, 3, 4)
  assert cosine(p, z).shape == (3,)
  assert_close(cosine(np.float32(factor) * p, z), cosine(p, z), 1e-5, 1e-6)
  assert_close(cosine(np.float32(factor) * z, z), -np.ones(3), 1e-5)


def test_cosine_of_zero_vectors_is_zero_with_a_finite_gradient():
  p, z = np.zeros((2, 3), np.float32), features(0, 2, 3)
  z[1] = 0
  value, grad = value_and_grad(lambda p: jnp.sum(losses.negative_cosine_similarity(p, z)))(p)
  assert float(value) == 0
  assert np.all(np.isfinite(grad))


def test_two_view_losses_agree_eagerly_under_vmap_and_in_bfloat16():
  arguments = [features(seed, 3, 4, 5) for seed in range(6)]
  for loss, count in ((losses.simsiam_loss, 4), (losses.byol_loss, 4), (losses.ssql_loss, 6)):
    used = arguments[:count]
    jitted = jax.jit(loss)
    loop = [jitted(*(a[i] for a in used)) for i in range(3)]
    assert_close(jax.jit(jax.vmap(loss))(*used), loop, 1e-6)
    assert_close(loss(*(a[0] for a in used)), loop[0], 1e-6)
    half = jitted(*(a[0].astype(jnp.bfloat16) for a in used))
    assert half.dtype == jnp.float32
    assert_close(half, loop[0], 0, 2e-2)


def test_losses_do_not_depend_on_the_number_of_devices():
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
  sharding = jax.NamedSharding(mesh, jax.P('data'))
  arguments = [features(seed, 16, 4) for seed in range(4)]
  sharded = jax.device_put(arguments, sharding)
  for loss, count in ((losses.simsiam_loss, 4), (losses.barlow_twins_loss, 2)):
    step = value_and_grad(loss)
    one, many = step(*arguments[:count]), step(*sharded[:count])
    assert_close(many[0], one[0], 1e-5)
    assert_close(many[1], one[1], 1e-5)


def test_dino_pairs_each_teacher_crop_with_the_other_crops_only():
  student, teacher = features(0, 4 * 2, 5), features(1, 2 * 2, 5)
  center = features(2, 5)
  targets = np.asarray(jax.nn.softmax((teacher - center) / 0.05, axis=-1))
  log_probs = np.asarray(jax.nn.log_softmax(student / 0.2, axis=-1))
  terms = [
    -np.sum(targets[2 * i + n] * log_probs[2 * v + n]) / 2
    for i in range(2)
    for v in range(4)
    for n in range(2)
    if v != i
  ]
  loss = jax.jit(losses.dino_loss, static_argnums=3)
  assert_close(loss(student, teacher, center, 4, 0.05, 0.2), np.sum(terms) / 6, 1e-5)
  assert_close(loss(student, teacher, center[None], 4, 0.05, 0.2), np.sum(terms) / 6, 1e-5)


def test_dino_loss_is_finite_for_large_logits():
  student, teacher, center = 1e4 * features(0, 4, 5), 1e4 * features(1, 4, 5), features(2, 5)
  value, grad = value_and_grad(losses.dino_loss, num_crops=2)(student, teacher, center)
  assert np.isfinite(value)
  assert np.all(np.isfinite(grad))


@pytest.mark.parametrize(
  ('warmup_epochs', 'expected'), [(0, [2, 2, 2]), (1, [1, 2, 2]), (2, [1, 2, 2]), (3, [1, 1.5, 2])]
)
def test_teacher_temperature_reaches_both_ends_within_the_warmup(warmup_epochs, expected):
  values = losses.dino_teacher_temperature(jnp.arange(3), 1.0, 2.0, warmup_epochs)
  assert_close(values, expected, 1e-6)


def test_barlow_loss_is_finite_with_a_constant_dimension():
  z = features(0, 6, 3)
  z[:, 1] = 0.3
  value, grad = value_and_grad(losses.barlow_twins_loss)(z, z)
  assert_close(jax.jit(losses.cross_correlation)(z, z)[1], np.zeros(3), 0, 1e-3)
  assert_close(value, 1, 2e-2)
  assert np.all(np.isfinite(grad))


ONES = np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: losses.negative_cosine_similarity(ONES, ONES[:2]), 'one shape'),
    (lambda: losses.negative_cosine_similarity(1.0, 1.0), 'feature axis'),
    (lambda: losses.simsiam_loss(ONES, ONES, ONES, ONES[:, :2]), 'z2'),
    (lambda: losses.byol_loss(ONES, ONES, ONES, ONES[:2]), 'one shape'),
    (lambda: losses.ssql_loss(ONES, ONES, ONES[:2], ONES[:2], ONES, ONES), 'one shape'),
    (lambda: losses.dino_loss(ONES, ONES, ONES[0], 1), 'at least 2'),
    (lambda: losses.dino_loss(ONES, ONES, ONES[0], 3), 'num_crops = 3'),
    (lambda: losses.dino_loss(ONES, ONES[:2], ONES[0], 2), 'teacher_logits'),
    (lambda: losses.dino_loss(ONES, ONES, ONES[:2], 2), 'center'),
    (lambda: losses.dino_loss(ONES, ONES, ONES[0], 2, 0.0), 'teacher_temperature must be'),
    (lambda: losses.dino_loss(ONES, ONES, ONES[0], 2, 0.1, -1.0), 'student_temperature must be'),
    (lambda: losses.barlow_twins_loss(ONES[:1], ONES[:1]), 'at least 2 rows'),
    (lambda: losses.barlow_twins_loss(ONES, ONES[:, :2]), 'one shape'),
  ],
)
def test_bad_arguments_raise(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_either_bound_of_the_denominator_is_as_written():
  # Norms 3e-9 and 5, and 3e-5 and 4e-5: one is below the bound, or the product alone.
  p, t = np.array([[3e-9, 0], [3e-5, 0]]), np.array([[3.0, 4.0], [1e-5, 4e-5]])
  norms = np.linalg.norm(p, axis=1), np.linalg.norm(t, axis=1)
  dot = (p * t).sum(1)
  product = losses.negative_cosine_similarity(p, t)
  assert_close(product, -dot / np.maximum(norms[0] * norms[1], 1e-8), 1e-5)
  each = losses.negative_cosine_similarity(p, t, bound_each=True)
  assert_close(each, -dot / (np.maximum(norms[0], 1e-8) * np.maximum(norms[1], 1e-8)), 1e-5)
  assert abs(product[0] / each[0]) > 1.5 and abs(product[1] / each[1]) < 0.5
