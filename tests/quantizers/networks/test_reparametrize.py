import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from golden_vectors import assert_close, golden
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.quantizers.networks.operands import CHANNEL, TENSOR
from jaxlab.quantizers.networks.repq import reparametrize
from jaxlab.quantizers.numerics.affine import AffineParams, fake_quantize


@golden('qwt', 'repq_scale_reparam')
@pytest.mark.parametrize('dtype, rtol', [('float64', 1e-9), ('float32', 1e-5)])
def test_reparametrization_agrees_with_reference(vectors, dtype, rtol):
  with jax.enable_x64(dtype == 'float64'):
    v = {name: jnp.asarray(array, dtype) for name, array in vectors.items()}
    norm = {'scale': v['in_ln_scale'], 'bias': v['in_ln_bias']}
    dense = {'kernel': v['in_weight'].T, 'bias': v['in_bias']}
    new = jax.jit(reparametrize)(norm, dense, v['in_act_delta'], v['in_act_zero_point'])
    assert_close(new.norm['scale'], vectors['out_ln_scale'], rtol)
    assert_close(new.norm['bias'], vectors['out_ln_bias'], rtol)
    assert_close(new.dense['kernel'].T, vectors['out_weight'], rtol)
    assert_close(new.dense['bias'], vectors['out_bias'], rtol)
    assert_close(new.scale, vectors['out_act_delta'], rtol)
    assert_close(new.zero_point, vectors['out_act_zero_point'], rtol)

    layer_norm = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)
    before = layer_norm.apply({'params': norm}, v['in_x'])
    after = layer_norm.apply({'params': new.norm}, v['in_x'])
    assert_close(before @ dense['kernel'] + dense['bias'], vectors['out_fp_before'], rtol)
    assert_close(after @ new.dense['kernel'] + new.dense['bias'], vectors['out_fp_after'], rtol)
    if dtype == 'float64':
      # The file's quantizer has 4 bits.
      merged = AffineParams(new.scale, new.zero_point, jnp.zeros(()), jnp.asarray(15.0))
      assert_close(fake_quantize(TENSOR, after, merged), vectors['out_ln_quantised'], rtol)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_reparametrization_preserves_the_function(seed, whole):
  rng = np.random.default_rng(seed)
  norm = {'scale': rng.normal(size=6), 'bias': rng.normal(size=6)}
  dense = {'kernel': rng.normal(size=(6, 3)), 'bias': rng.normal(size=3)}
  scale = np.exp(rng.normal(size=6))
  zero_point = rng.integers(0, 15, 6).astype(float)
  if whole:
    zero_point[0] += -zero_point.sum() % 6
  x = rng.normal(size=(20, 6))
  with jax.enable_x64(True):
    norm, dense = jax.tree.map(jnp.asarray, (norm, dense))
    new = reparametrize(norm, dense, jnp.asarray(scale), jnp.asarray(zero_point))
    before, after = (x * n['scale'] + n['bias'] for n in (norm, new.norm))
    outputs = [
      before @ dense['kernel'] + dense['bias'],
      after @ new.dense['kernel'] + new.dense['bias'],
    ]
    np.testing.assert_allclose(*outputs, atol=1e-10 * np.max(np.abs(after)))
    if whole:
      bounds = {'low': jnp.zeros(()), 'high': jnp.asarray(15.0)}
      before = fake_quantize(CHANNEL, before, AffineParams(scale, zero_point, **bounds))
      after = fake_quantize(TENSOR, after, AffineParams(new.scale, new.zero_point, **bounds))
      outputs = [
        before @ dense['kernel'] + dense['bias'],
        after @ new.dense['kernel'] + new.dense['bias'],
      ]
      np.testing.assert_allclose(*outputs, atol=1e-9 * np.max(np.abs(outputs[0])))


def test_a_constant_channel_moves_into_the_bias():
  norm = {'scale': jnp.array([1.0, 0.0, 2.0]), 'bias': jnp.array([0.1, 50.0, -0.3])}
  dense = {'kernel': jnp.ones((3, 2)), 'bias': jnp.zeros(2)}
  scale, zero_point = jnp.array([0.1, 0.0, 0.3]), jnp.array([7.0, 0.0, 8.0])
  new = reparametrize(norm, dense, scale, zero_point, value=jnp.array([9.0, 50.0, 9.0]))
  np.testing.assert_allclose([new.scale, new.zero_point], [0.2, 7.5], rtol=1e-6)
  assert new.norm['scale'][1] == 0 and new.norm['bias'][1] == 0
  x = jax.random.normal(jax.random.key(0), (5, 3))
  before = (x * norm['scale'] + norm['bias']) @ dense['kernel'] + dense['bias']
  after = (x * new.norm['scale'] + new.norm['bias']) @ new.dense['kernel'] + new.dense['bias']
  np.testing.assert_allclose(before, after, rtol=1e-5)
  silent = reparametrize(norm, dense, jnp.zeros(3), jnp.zeros(3), value=norm['bias'])
  assert silent.scale == 0 and np.all(np.isfinite(silent.dense['bias']))
