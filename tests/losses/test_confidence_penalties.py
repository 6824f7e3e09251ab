import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close

from jaxlab import losses

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(7, 4))
LABELS = np.array([0, 1, 2, 3, 0, 1, 0])
P = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)


def test_maximum_entropy_is_scipys_entropy_off_the_cross_entropy():
  from scipy import stats

  expected = -np.log(P[np.arange(7), LABELS]) - 0.7 * stats.entropy(P, axis=1)
  assert_close(losses.max_entropy_loss(LOGITS, LABELS, 0.7), expected, 1e-5)
  assert_close(
    losses.max_entropy_loss(LOGITS, LABELS, 0.0), losses.cross_entropy(LOGITS, LABELS), 1e-6
  )


def test_confusion_is_the_mean_over_pairs_of_different_classes():
  pairs = [np.sum((P[i] - P[j]) ** 2) for i in range(7) for j in range(i) if LABELS[i] != LABELS[j]]
  assert_close(losses.pairwise_confusion(LOGITS, LABELS), np.mean(pairs), 1e-5)
  assert float(losses.pairwise_confusion(LOGITS, LABELS * 0)) == 0


@pytest.mark.parametrize('loss', [losses.max_entropy_loss, losses.pairwise_confusion])
def test_a_masked_class_counts_as_absent(loss):
  labels = LABELS % 3
  masked = np.where(np.arange(4) == 3, -np.inf, LOGITS)
  value = jax.jit(jax.value_and_grad(lambda x: jnp.sum(loss(x, labels))))
  (found, gradient), (expected, part) = value(masked), value(LOGITS[:, :3])
  assert_close(found, expected, 1e-6)
  assert_close(gradient[:, :3], part, 1e-5)
  assert not np.any(gradient[:, 3])
  outside = jax.jit(loss)(LOGITS, jnp.array([0, 1, 2, 3, 4, -1, 0]))
  assert np.isnan(outside).any() and np.isnan(jnp.mean(outside))


def test_penalties_refuse_what_does_not_fit():
  with pytest.raises(ValueError, match='gamma must not be negative'):
    losses.max_entropy_loss(LOGITS, LABELS, -1.0)
  with pytest.raises(ValueError, match=r'labels must be in \[0, 4\)'):
    losses.pairwise_confusion(LOGITS, LABELS + 2)
  with pytest.raises(ValueError, match=r'\[batch, num_classes\]'):
    losses.pairwise_confusion(LOGITS[0], LABELS[0])
