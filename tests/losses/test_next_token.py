import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close

from jaxlab.losses.language import next_token_cross_entropy, next_token_mask


def arrays(seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((3, 4, 7)), rng.integers(0, 7, (3, 5))


def by_hand(logits, tokens):
  out = np.zeros(logits.shape[:2])
  for b, t in np.ndindex(*out.shape):
    out[b, t] = np.log(np.exp(logits[b, t]).sum()) - logits[b, t, tokens[b, t + 1]]
  return out


def test_loss_is_the_negative_log_likelihood_of_the_next_token():
  logits, tokens = arrays()
  with jax.enable_x64(True):
    losses = jax.jit(next_token_cross_entropy)(logits, tokens)
    assert losses.dtype == jnp.float64
    assert_close(losses, by_hand(logits, tokens), 1e-12)
  losses = next_token_cross_entropy(jnp.asarray(logits, jnp.bfloat16), tokens)
  assert losses.dtype == jnp.float32
  assert_close(losses, by_hand(logits, tokens), 0.02)


def test_padding_contributes_nothing_not_even_a_gradient():
  logits, tokens = arrays()
  mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1] * 5])
  counts = np.array([[0, 0, 1, 1], [1, 1, 0, 0], [1] * 4], bool)
  np.testing.assert_array_equal(next_token_mask(mask), counts)
  logits[~counts] = np.inf  # what a decoder says of padding means nothing

  def loss(logits):
    return jnp.sum(next_token_cross_entropy(logits, tokens, mask))

  losses = next_token_cross_entropy(logits, tokens, mask)
  assert (np.asarray(losses)[~counts] == 0).all()
  finite = np.where(counts[..., None], logits, 0)
  assert_close(losses, by_hand(finite, tokens) * counts, 1e-6)
  gradient = jax.grad(loss)(jnp.asarray(logits))
  assert (np.asarray(gradient)[~counts] == 0).all()


def test_vmap_is_the_batch():
  logits, tokens = arrays()
  one = jax.vmap(lambda a, b: next_token_cross_entropy(a[None], b[None])[0])
  assert_close(one(logits, tokens), next_token_cross_entropy(logits, tokens), 1e-6)


def test_wrong_arguments_raise():
  logits, tokens = arrays()
  with pytest.raises(ValueError, match=r'tokens \[batch, time \+ 1\]; got .* Feed the decoder'):
    next_token_cross_entropy(logits, tokens[:, :-1])
  with pytest.raises(ValueError, match='tokens must be integers'):
    next_token_cross_entropy(logits, tokens.astype(float))
  with pytest.raises(ValueError, match='mask'):
    next_token_cross_entropy(logits, tokens, np.ones((3, 4)))
