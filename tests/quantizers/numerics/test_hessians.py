import itertools

import jax
import numpy as np
import pytest
from flax import linen as nn

from jaxlab.models.intercept import Hook, apply
from jaxlab.quantizers.networks.layer_inputs import LayerRows
from jaxlab.quantizers.numerics.hessians import unfold

RNG = np.random.default_rng(0)
CASES = {
  '1-D': ((9,), (3,), (2,), [(1, 1)], (2,)),
  '2-D': ((7, 6), (3, 2), (2, 1), [(1, 2), (0, 1)], (1, 2)),
  '3-D': ((4, 5, 3), (2, 3, 1), (1, 2, 1), [(0, 1), (1, 1), (0, 0)], (1, 1, 1)),
  'cropped': ((8, 8), (3, 3), (1, 2), [(-1, 0), (1, -2)], (1, 1)),
}


def patches(x, size, strides, padding, dilation):
  """By loops over positions and taps."""
  x = np.pad(x, ((0, 0), *((max(low, 0), max(high, 0)) for low, high in padding), (0, 0)))
  cut = (slice(max(-low, 0), n - max(-high, 0)) for (low, high), n in zip(padding, x.shape[1:-1]))
  x = x[:, *cut]
  ends = [
    (n - (k - 1) * d - 1) // s + 1 for n, k, s, d in zip(x.shape[1:-1], size, strides, dilation)
  ]
  found = np.zeros((len(x), *ends, x.shape[-1], *size), x.dtype)
  for at in itertools.product(*map(range, ends)):
    for tap in itertools.product(*map(range, size)):
      place = [p * s + t * d for p, s, t, d in zip(at, strides, tap, dilation)]
      found[:, *at, :, *tap] = x[:, *place]
  return found.reshape(len(x), *ends, -1)


@pytest.mark.parametrize('name', CASES)
def test_patches_are_copies_of_what_the_window_sees(name):
  shape, *window = CASES[name]
  x = RNG.normal(size=(2, *shape, 3)).astype(np.float32)
  np.testing.assert_array_equal(unfold(x, *window), patches(x, *window))


@pytest.mark.parametrize('groups', [1, 2, 6])
@pytest.mark.parametrize('axes', [1, 2])
def test_the_rows_of_a_convolution_times_its_kernel_are_its_output(axes, groups):
  x = RNG.normal(size=(*(2, 5, 4, 6)[: axes + 1], 6)).astype(np.float32)
  conv = nn.Conv(12, (3,) * axes, 2, kernel_dilation=1, feature_group_count=groups, use_bias=False)
  variables = conv.init(jax.random.key(0), x)
  seen = {}

  def visit(site, call, x):
    rows = LayerRows()
    seen['rows'] = rows(site, x, site.module.scope.get_variable('params', 'kernel'))
    assert not rows.running
    return call(x)

  y = apply(conv, variables, x, hooks=[Hook('', call=visit)])
  rows = np.asarray(seen['rows'], np.float64).reshape(*y.shape[:-1], groups, -1)
  # [*window, in, groups * out] to [groups, in * window, out]
  kernel = np.asarray(variables['params']['kernel'], np.float64)
  kernel = np.moveaxis(kernel, -2, 0).reshape(-1, groups, 12 // groups)
  expected = np.einsum('...gi,igo->...go', rows, kernel).reshape(y.shape)
  np.testing.assert_allclose(y, expected, atol=1e-5)
  # Copies, not products: no other value is among them.
  assert np.isin(np.asarray(seen['rows']), np.append(x, 0)).all()
