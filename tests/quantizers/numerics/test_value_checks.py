import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab import quantizers
from jaxlab.losses import _arguments
from jaxlab.quantizers import AffineQuantizer
from jaxlab.quantizers.compensation import channel_affine, linear
from jaxlab.quantizers.numerics import gptq, learned, storage

QUANTIZER = AffineQuantizer(4, 'asymmetric', 'channel')
X = jax.random.normal(jax.random.key(0), (16, 4))
PARAMS = quantizers.calibrate(QUANTIZER, X)
DAMPING = jnp.float32(0.01)
BITS = jnp.int32(3)
STATS = channel_affine.update_channel_affine_stats(
  channel_affine.init_channel_affine_stats(4), X, 2 * X
)
CALLS = {
  'traced range': lambda: quantizers.params_from_range(QUANTIZER, X.min(0), X.max(0)),
  'concrete range': lambda: quantizers.params_from_range(QUANTIZER, PARAMS.low, PARAMS.high),
  'quantize': lambda: quantizers.quantize(QUANTIZER, X, PARAMS),
  'bits': lambda: quantizers.calibrate(QUANTIZER, X, bits=BITS).scale,
  'store': lambda: storage.store(QUANTIZER, X, PARAMS).codes,
  'pack': lambda: quantizers.pack_int4(storage.store(QUANTIZER, X, PARAMS).integer_codes()),
  'gptq': lambda: gptq.gptq(X.T, jnp.eye(16), 4, damping=DAMPING).weight,
  'lsq_scale': lambda: learned.lsq_scale(X, PARAMS.high),
  'affine': lambda: channel_affine.solve_channel_affine(STATS, clip=True),
  'linear': lambda: linear.fit_linear_compensation(X, 2 * X),
}


@pytest.mark.parametrize('call', CALLS.values(), ids=CALLS)
def test_arrays_that_a_jit_closes_over_pass_the_checks(call):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), jax.jit(call)(), call()
  )


def test_a_bad_value_that_a_jit_closes_over_is_found():
  with pytest.raises(ValueError, match='lies above'):
    jax.jit(lambda: quantizers.params_from_range(QUANTIZER, PARAMS.high, PARAMS.low))()
  damping = jnp.float32(-1)
  with pytest.raises(ValueError, match='must not be negative'):
    jax.jit(lambda: gptq.gptq(X.T, jnp.eye(16), 4, damping=damping).weight)()


class Elsewhere:
  """What this process sees of an array whose other shards lie in another process."""

  is_fully_addressable = False
  shape, dtype, size, ndim = (2,), np.dtype(np.float32), 2, 1

  def __array__(self, *args, **kwargs):
    raise RuntimeError('spans non-addressable devices')


def test_values_that_lie_in_another_process_are_not_asked_for():
  from jaxlab.quantizers.numerics import affine, integers

  array = Elsewhere()
  assert not _arguments.is_concrete(array)
  affine._check_range(array, array)
  affine._check_extent(QUANTIZER, array, array)
  affine.check_bits(array)
  learned._check_high(array)
  integers._check_whole(array, 'zero_point')
  assert not storage._differ(array, PARAMS.low)
  assert linear.is_traced([X, array])


def test_saving_what_another_process_holds_names_it_and_the_way_out(tmp_path):
  with pytest.raises(ValueError, match=r"'fc/bias' .*process_allgather"):
    quantizers.save_quantized(tmp_path / 'a', {'fc': {'bias': Elsewhere(), 'kernel': X}})
  assert not list(tmp_path.iterdir())
