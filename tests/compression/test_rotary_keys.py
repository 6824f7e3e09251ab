import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import compression
from jaxlab.models import rotary_embedding


def keys(heads=4, width=6, rows=40):
  """Correlated heads `[1, rows, heads, width]`."""
  rng = np.random.default_rng(0)
  mix = rng.standard_normal((heads * width,) * 2) * np.geomspace(1, 0.1, heads * width)
  return (rng.standard_normal((rows, heads * width)) @ mix).reshape(1, rows, heads, width)


def as_complex(x):
  half = x.shape[-1] // 2
  return x[..., :half] + 1j * x[..., half:]


@pytest.mark.parametrize('size', [1, 2, 4])
def test_the_commuting_basis_holds_the_first_singular_vector_of_every_pair_of_channels(size):
  x = keys()
  basis = compression.commuting_basis(compression.group_gram(x, size), 6)
  pairs = as_complex(x)[0].reshape(40, 4 // size, size, 3)
  rows = x.reshape(40, 4 // size, size * 6)
  cached = as_complex(np.einsum('ngi,gik->ngk', rows, basis))
  back = np.einsum('ngk,gik->ngi', np.einsum('ngi,gik->ngk', rows, basis), basis)
  back = as_complex(back.reshape(40, 4 // size, size, 6))
  for group in range(4 // size):
    for pair in range(3):
      own = pairs[:, group, :, pair]
      left, values, right = np.linalg.svd(own, full_matrices=False)
      best = values[0] * left[:, :1] @ right[:1]
      np.testing.assert_allclose(back[:, group, :, pair], best, atol=1e-9)
      np.testing.assert_allclose(np.linalg.norm(cached[:, group, pair]), values[0], rtol=1e-9)
  np.testing.assert_allclose(
    basis.swapaxes(1, 2) @ basis, np.broadcast_to(np.eye(6), (4 // size, 6, 6)), atol=1e-12
  )


def test_the_commuting_basis_is_the_same_behind_a_rotation_and_commutes_with_it():
  with jax.enable_x64(True):
    x = jnp.asarray(keys())
    turn = lambda y: rotary_embedding(y, jnp.arange(40)[None], 50.0)  # noqa: E731
    rotated = turn(x)
    basis = compression.commuting_basis(compression.group_gram(x, 2), 6)
    same = compression.commuting_basis(compression.group_gram(rotated, 2), 6)
    np.testing.assert_allclose(same, basis, atol=1e-9)
    cached = lambda y: jnp.einsum('btgi,gik->btgk', y.reshape(1, 40, 2, 12), basis)  # noqa: E731
    np.testing.assert_allclose(cached(rotated), turn(cached(x)), atol=1e-9)
    other = compression.group_basis(compression.group_gram(x, 2), 6)
    wrong = lambda y: jnp.einsum('btgi,gik->btgk', y.reshape(1, 40, 2, 12), other)  # noqa: E731
    assert np.abs(wrong(rotated) - turn(wrong(x))).max() > 0.1


def test_what_does_not_fit_raises():
  gram = compression.group_gram(keys(), 2)
  for width in (3, 8, 0):
    with pytest.raises(ValueError, match=f'head_width={width}: expected an even divisor of 12'):
      compression.commuting_basis(gram, width)
  with pytest.raises(ValueError, match=r'gram must be \[groups, n, n\]'):
    compression.commuting_basis(gram[0], 6)
  with pytest.raises(ValueError, match='gram has values that are not finite'):
    compression.commuting_basis(np.inf * gram, 6)
