import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close
from scipy.special import log_softmax

from jaxlab.losses import token_classifier_loss

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((2, 5, 3))
LABELS = RNG.integers(0, 3, (2, 5))
MASK = np.array([[0, 1, 1, 0, 0], [0, 1, 1, 1, 1]], bool)
EACH = -np.take_along_axis(log_softmax(LOGITS, -1), LABELS[..., None], -1)[..., 0]


@pytest.mark.parametrize(
  ('mode', 'expected'), [('text_only', EACH[MASK].mean()), ('all_positions', EACH.mean())]
)
def test_the_mean_is_over_the_tokens_that_count(mode, expected):
  loss = jax.jit(token_classifier_loss, static_argnames='mode')
  assert_close(loss(LOGITS, LABELS, MASK, mode=mode), expected, 1e-6)
  half = loss(jnp.asarray(LOGITS, jnp.bfloat16), LABELS, MASK, mode=mode)
  assert half.dtype == jnp.float32
  assert_close(half, expected, 0.02)


def test_what_does_not_count_changes_nothing():
  labels = np.where(MASK, LABELS, 99)
  logits = np.where(MASK[..., None], LOGITS, np.inf)
  loss, gradient = jax.value_and_grad(token_classifier_loss)(logits, labels, MASK)
  assert_close(loss, EACH[MASK].mean(), 1e-6)
  assert np.isfinite(gradient).all() and not gradient[~MASK].any()
  probabilities = np.exp(log_softmax(LOGITS, -1)) - np.eye(3)[LABELS]
  assert_close(gradient, np.where(MASK[..., None], probabilities, 0) / MASK.sum(), 1e-5)
  assert token_classifier_loss(LOGITS, LABELS, np.zeros_like(MASK)) == 0


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((LOGITS, LABELS, MASK, 'text'), "mode='text', expected 'text_only'"),
    ((LOGITS, LABELS, MASK[:, :3]), r'mask must be \(2, 5\)'),
    ((LOGITS, LABELS[:, :3], MASK), r'got \(2, 5, 3\), \(2, 3\)'),
    ((LOGITS, LABELS * 1.0, MASK), 'integers'),
    ((LOGITS, LABELS + 3, MASK), r'labels must be in \[0, 3\)'),
    ((LOGITS, np.where(MASK, LABELS, 9), MASK, 'all_positions'), r'\[0, 3\)'),
  ],
)
def test_bad_input_is_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    token_classifier_loss(*arguments)
