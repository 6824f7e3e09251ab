import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close, golden

from jaxlab.losses.classification import label_smoothing_cross_entropy
from jaxlab.losses.stability import acsr_loss, stability_loss


@pytest.fixture(params=['float32', 'float64'])
def rtol(request):
  """Runs a test in both precisions; the tolerance of each."""
  with jax.enable_x64(request.param == 'float64'):
    yield {'float32': 2e-6, 'float64': 1e-9}[request.param]


def arguments(seed=0):
  rng = np.random.default_rng(seed)
  logits = rng.standard_normal((5, 3)).astype(np.float32)
  embeddings, frozen = rng.standard_normal((2, 8, 6)).astype(np.float32)
  return logits, rng.integers(0, 3, 5), embeddings, frozen


@golden('acsr', 'acsr_loss')
def test_acsr_loss_its_terms_and_gradients_agree_with_reference(vectors, rtol):
  def loss(*args):
    return acsr_loss(*args, beta=vectors.param('beta'), smoothing=vectors.param('smoothing'))

  step = jax.jit(jax.value_and_grad(loss, (0, 2), has_aux=True))
  (value, aux), grads = step(
    vectors['in_logits'],
    vectors['in_labels'],
    vectors['in_base_embeddings'],
    vectors['in_frozen_base_embeddings'],
  )
  assert_close(value, vectors['out_loss'], rtol)
  assert_close(aux['cross_entropy'], vectors['out_label_smoothing_ce'], rtol)
  # A mean of cosines of both signs: accurate relative to them, not to their sum.
  assert_close(aux['cosine'], vectors['out_mean_cosine'], rtol, atol=rtol * 0.1)
  assert_close(grads[0], vectors['grad_logits'], rtol)
  assert_close(grads[1], vectors['grad_base_embeddings'], rtol)


def test_stability_is_one_for_scaled_and_minus_one_for_opposite_embeddings():
  _, _, embeddings, frozen = arguments()
  lengths = np.linspace(0.1, 9, 8, dtype=np.float32)[:, None]
  assert_close(stability_loss(lengths * frozen, frozen), 1.0, 1e-6)
  assert_close(stability_loss(-lengths * frozen, frozen), -1.0, 1e-6)
  value = stability_loss(embeddings, frozen)
  assert_close(stability_loss(lengths * embeddings, frozen), value, atol=1e-6)


def test_no_gradient_reaches_the_frozen_embeddings_and_zero_vectors_are_finite():
  _, _, embeddings, frozen = arguments()
  grads = jax.jit(jax.grad(stability_loss, (0, 1)))(embeddings, frozen)
  assert np.any(grads[0])
  assert not np.any(grads[1])
  embeddings[0], frozen[1] = 0, 0
  value, grad = jax.jit(jax.value_and_grad(stability_loss))(embeddings, frozen)
  assert_close(value, stability_loss(embeddings[2:], frozen[2:]) * 6 / 8, atol=1e-6)
  assert np.all(np.isfinite(grad))


def test_beta_zero_leaves_the_smoothed_cross_entropy():
  args = arguments()
  value, aux = acsr_loss(*args, beta=0.0, smoothing=0.2)
  assert_close(value, jnp.mean(label_smoothing_cross_entropy(*args[:2], 0.2)), 1e-6)
  assert_close(aux['cosine'], stability_loss(*args[2:]), 1e-6)


def test_loss_agrees_compiled_under_vmap_in_bfloat16_and_on_many_devices():
  stacked = [np.stack(x) for x in zip(*[arguments(seed) for seed in range(3)])]

  def loss(*args):
    return acsr_loss(*args)[0]

  loop = np.stack([loss(*args) for args in zip(*stacked)])
  assert_close(jax.jit(jax.vmap(loss))(*stacked), loop, 1e-5)
  logits, labels, embeddings, frozen = arguments()
  half = loss(
    *(jnp.asarray(x, jnp.bfloat16 if x.dtype == np.float32 else None) for x in arguments())
  )
  assert half.dtype == jnp.float32
  assert_close(half, loop[0], 1e-2)
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
  sharded = jax.device_put((embeddings, frozen), jax.NamedSharding(mesh, jax.P('data')))
  assert_close(jax.jit(loss)(logits, labels, *sharded), loop[0], 1e-6)


Z, Y, E, F = arguments()


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: stability_loss(E, F[1:]), 'one shape'),
    (lambda: stability_loss(E[:0], F[:0]), 'embeddings must not be empty'),
    (lambda: acsr_loss(Z, Y, E, F, beta=-0.1), 'beta must not be negative, got -0.1'),
    (lambda: acsr_loss(Z, Y, E, F, smoothing=1.5), r'smoothing must be in \[0, 1\]'),
    (lambda: acsr_loss(Z, Y + 3, E, F), r'labels must be in \[0, 3\)'),
    (lambda: acsr_loss(Z, Y[1:], E, F), 'Expected logits'),
    (lambda: acsr_loss(Z, Y, E, F[:, 1:]), 'one shape'),
  ],
)
def test_bad_arguments_raise(call, message):
  with pytest.raises(ValueError, match=message):
    call()
