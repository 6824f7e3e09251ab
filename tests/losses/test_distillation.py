import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.losses import distillation
from jaxlab.losses.long_tail import balanced_softmax_loss

COUNTS = np.array([200, 60, 20, 7, 1])


@pytest.fixture(params=['float32', 'float64'])
def rtol(request):
  """Runs a test in both precisions; the tolerance of each."""
  with jax.enable_x64(request.param == 'float64'):
    yield {'float32': 2e-6, 'float64': 1e-9}[request.param]


def batch(seed=0, size=8, num_classes=5):
  rng = np.random.default_rng(seed)
  student, teacher = (2 * rng.standard_normal((2, size, num_classes))).astype(np.float32)
  return student, teacher, rng.integers(0, num_classes, size)


@golden('dive', 'dive_loss')
def test_dive_loss_its_terms_and_gradient_agree_with_reference(vectors, rtol):
  options = {name: vectors.param(name) for name in ('temperature', 'power', 'alpha')}

  def loss(*args):
    return distillation.dive_loss(*args, **options)

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  teacher = vectors['in_teacher_logits']
  (value, aux), grad = step(
    vectors['in_student_logits'], teacher, vectors['in_labels'], vectors['in_class_counts']
  )
  assert_close(value, vectors['out_loss'], rtol)
  assert_close(aux['distillation'], vectors['out_kl_term_scaled'], rtol)
  assert_close(aux['balanced_softmax'], vectors['out_balanced_softmax_term'], rtol)
  assert_close(grad, vectors['grad_student_logits'], rtol)
  targets = distillation.flatten_distribution(teacher, options['temperature'], options['power'])
  assert_close(targets, vectors['out_teacher_soft_targets'], rtol)


@golden('dive', 'virtual_examples')
def test_virtual_examples_agree_with_reference(vectors, rtol):
  counts = distillation.virtual_example_counts(
    vectors['in_teacher_logits'], vectors.param('temperature'), vectors.param('power')
  )
  assert_close(counts, vectors['out_virtual_counts'], rtol)


temperatures = st.floats(0.2, 50)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), temperatures, st.floats(0.1, 2))
def test_flattening_is_a_power_of_the_softened_prediction(seed, temperature, power):
  logits = batch(seed)[1]
  softened = (
    np.asarray(jax.nn.softmax(logits.astype(np.float64) / temperature), np.float64) ** power
  )
  expected = softened / softened.sum(-1, keepdims=True)
  flat = distillation.flatten_distribution(logits, temperature, power)
  assert_close(flat, expected, 1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), temperatures, temperatures)
def test_virtual_examples_sum_to_the_images_and_no_entropy_falls_with_temperature(seed, t1, t2):
  logits = batch(seed)[1]
  counts = distillation.virtual_example_counts(logits, t1)
  assert_close(jnp.sum(counts), len(logits), 1e-5)

  def entropy(temperature):
    probs = np.asarray(distillation.flatten_distribution(logits, temperature), np.float64)
    return -np.sum(probs * np.log(np.maximum(probs, 1e-300)), axis=-1)

  assert np.all(entropy(max(t1, t2)) >= entropy(min(t1, t2)) - 1e-5)


def test_virtual_examples_are_even_at_infinite_temperature_and_sum_over_all_axes():
  logits = np.stack([batch(seed)[1] for seed in range(3)])
  even = distillation.virtual_example_counts(logits, 1e7)
  assert_close(even, np.full(5, logits[..., 0].size / 5), 1e-5)
  flat = distillation.virtual_example_counts(logits.reshape(-1, 5), 2.0, 0.5)
  assert_close(distillation.virtual_example_counts(logits, 2.0, 0.5), flat, 1e-6)


def test_distillation_is_zero_for_equal_predictions_and_positive_otherwise():
  student, teacher, _ = batch()
  same = distillation.distillation_loss(teacher + 3, teacher, 2.0)
  assert_close(same, np.zeros(8), atol=1e-5)
  assert np.all(distillation.distillation_loss(student, teacher, 2.0) > 0.01)


def test_distillation_gradient_keeps_its_size_when_the_temperature_changes():
  student, teacher, _ = batch()
  grad = jax.jit(jax.grad(lambda z, t: jnp.sum(distillation.distillation_loss(z, teacher, t))))
  # In the limit it is that of half the squared distance of the centered logits, by the class number.
  center = (student - student.mean(-1, keepdims=True)) - (teacher - teacher.mean(-1, keepdims=True))
  assert_close(grad(student, 300.0), center / 5, 5e-2)


def test_alpha_zero_is_balanced_softmax_exactly_and_alpha_one_knows_no_labels():
  student, teacher, labels = batch()

  def dive(z, y, alpha):
    return distillation.dive_loss(z, teacher, y, COUNTS, alpha=alpha)[0]

  value, grad = jax.value_and_grad(dive)(student, labels, 0.0)
  expected = jax.value_and_grad(lambda z: jnp.mean(balanced_softmax_loss(z, labels, COUNTS)))(
    student
  )
  assert value == expected[0]
  np.testing.assert_array_equal(grad, expected[1])
  assert dive(student, labels, 1.0) == dive(student, (labels + 1) % 5, 1.0)


def test_a_compiled_program_may_close_over_a_temperature_that_is_an_array():
  student, teacher, _ = batch()
  for temperature, message in ((jnp.float32(2.0), None), (jnp.float32(-2.0), 'must be positive')):
    loss = jax.jit(lambda z, t=temperature: distillation.distillation_loss(z, teacher, t))
    if message is None:
      assert_close(loss(student), distillation.distillation_loss(student, teacher, 2.0), 1e-5)
    else:
      with pytest.raises(ValueError, match=message):
        loss(student)


def test_no_gradient_reaches_the_teacher():
  student, teacher, labels = batch()

  def loss(student, teacher):
    return distillation.dive_loss(student, teacher, labels, COUNTS)[0]

  grads = jax.jit(jax.grad(loss, (0, 1)))(student, teacher)
  assert np.any(grads[0])
  assert not np.any(grads[1])


def test_confident_teacher_and_student_give_finite_gradients():
  student, teacher, labels = batch()
  step = jax.jit(jax.value_and_grad(lambda z, t: distillation.dive_loss(z, t, labels, COUNTS)[0]))
  value, grad = step(1e4 * student, 1e4 * teacher)
  assert np.isfinite(value)
  assert np.all(np.isfinite(grad))


def test_loss_agrees_compiled_under_vmap_in_bfloat16_and_on_many_devices():
  student, teacher, labels = (np.stack(x) for x in zip(*[batch(seed) for seed in range(3)]))

  def loss(*args):
    return distillation.dive_loss(*args, COUNTS)[0]

  loop = np.stack([loss(*args) for args in zip(student, teacher, labels)])
  assert_close(jax.jit(jax.vmap(loss))(student, teacher, labels), loop, 1e-5)
  half = jax.jit(loss)(student[0].astype(jnp.bfloat16), teacher[0].astype(jnp.bfloat16), labels[0])
  assert half.dtype == jnp.float32
  assert_close(half, loop[0], 2e-2)
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
  args = jax.device_put((student[0], teacher[0], labels[0]), jax.NamedSharding(mesh, jax.P('data')))
  assert_close(jax.jit(loss)(*args), loop[0], 1e-6)


S, T, Y = batch()


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: distillation.distillation_loss(S, T[1:], 1.0), 'one shape'),
    (lambda: distillation.distillation_loss(S, T, 0.0), 'temperature must be positive'),
    (lambda: distillation.flatten_distribution(T, -1.0), 'temperature must be positive'),
    (lambda: distillation.flatten_distribution(T, 1.0, 0.0), 'power must be positive'),
    (lambda: distillation.flatten_distribution(1.0, 1.0), 'a feature axis'),
    (lambda: distillation.virtual_example_counts(T, 1.0, -1.0), 'power must be positive'),
    (lambda: distillation.dive_loss(S, T, Y, COUNTS, alpha=1.5), r'alpha must be in \[0, 1\]'),
    (lambda: distillation.dive_loss(S, T, Y, COUNTS, power=0), 'power must be positive'),
    (lambda: distillation.dive_loss(S, T, Y, COUNTS, temperature=0), 'temperature must be'),
    (lambda: distillation.dive_loss(S, T[:, 1:], Y, COUNTS), 'one shape'),
    (lambda: distillation.dive_loss(S, T, Y + 5, COUNTS), r'labels must be in \[0, 5\)'),
    (lambda: distillation.dive_loss(S, T, Y, COUNTS - 1), 'got 0 for class 4'),
    (lambda: distillation.dive_loss(S, T, Y, COUNTS[1:]), r'class_counts must be \[5\]'),
  ],
)
def test_bad_arguments_raise(call, message):
  with pytest.raises(ValueError, match=message):
    call()
