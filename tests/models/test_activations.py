import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close
from jax.test_util import check_grads

from jaxlab.models.activations import gelu, gelu_tanh

pairs = pytest.mark.parametrize(
  'own, approximate', [(gelu, False), (gelu_tanh, True)], ids=['exact', 'tanh']
)
POINTS = np.concatenate([np.linspace(-6, 6, 41), [-30.0, 30.0]])


@pairs
def test_values_and_gradients_are_jax_own(own, approximate):
  plain = functools.partial(jax.nn.gelu, approximate=approximate)
  x = jnp.asarray(POINTS, jnp.float32)
  for function in (lambda f: f, lambda f: jax.vmap(jax.grad(f))):
    np.testing.assert_allclose(function(own)(x), function(plain)(x), rtol=1e-5, atol=2e-6)


@pairs
def test_derivatives_of_both_modes_and_orders(own, approximate):
  del approximate
  with jax.enable_x64(True):
    check_grads(own, (jnp.asarray(POINTS[5:36]),), order=2, modes=('fwd', 'rev'))


@pairs
def test_dtype_stays(own, approximate):
  del approximate
  x = jnp.asarray(POINTS, jnp.bfloat16)
  y, pull = jax.vjp(own, x)
  (gradient,) = pull(jnp.ones_like(y))
  assert y.dtype == gradient.dtype == jnp.bfloat16
  assert_close(y.astype(jnp.float32), own(x.astype(jnp.float32)), 2e-2, atol=2e-2)
