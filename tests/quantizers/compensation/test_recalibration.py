import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from golden_vectors import assert_close
from models.random_variables import random_images, random_variables

from jaxlab.models import Hook, ViT, apply
from jaxlab.quantizers.compensation import QwTv2, compensate
from jaxlab.quantizers.networks.operands import TENSOR, affine_constants
from jaxlab.quantizers.networks.repq import repq
from jaxlab.quantizers.networks.rules import edge_rules

X = random_images((16, 8, 8, 3))
BATCHES = [X[:8], X[8:]]
MODEL = ViT(patch_size=4, image_size=8, width=8, depth=1, num_heads=2, num_classes=3)


@functools.cache
def quantized():
  return repq(MODEL, random_variables(MODEL, X), X, edge_rules(2, 3))


def constants(variables):
  return traverse_util.flatten_dict(dict(variables['quantization']), sep='/')


def test_ranges_of_inputs_are_those_of_what_flows_in_the_compensated_network():
  result = compensate(quantized(), BATCHES, QwTv2(), dtype=jnp.float32)
  own, old = constants(result.variables), constants(quantized().variables)
  paths = [
    name.removesuffix('/input/zero_point') for name in own if name.endswith('input/zero_point')
  ]
  inside = [path for path in paths if path.startswith('blocks')]
  assert len(inside) >= 5 and own.keys() == old.keys()

  def keep(site, call, x, *args, **kwargs):
    site.write('x', x)
    return call(x, *args, **kwargs)

  variables, hooks = result.unbind()
  hooks = [*hooks, Hook('|'.join(inside), call=keep, collection='seen')]
  run = jax.jit(lambda v: apply(MODEL, v, BATCHES[0], hooks=hooks, mutable=['seen'])[1])
  seen = traverse_util.flatten_dict(run(variables)['seen'], sep='/')
  for path in inside:
    expected = affine_constants(TENSOR, seen[f'{path}/x'], 3)
    assert_close(own[f'{path}/input/scale'], expected['scale'], 1e-5)
    assert_close(own[f'{path}/input/zero_point'], expected['zero_point'], 1e-5, atol=1e-6)
  kept = [name for name in own if '/kernel/' in name or name.startswith(('head', 'patch_embed'))]
  for name in kept:
    assert np.array_equal(own[name], old[name])


def test_ranges_stay_where_that_is_asked_for():
  result = compensate(quantized(), BATCHES, QwTv2(recalibrate=False), dtype=jnp.float32)
  jax.tree.map(
    np.testing.assert_array_equal,
    result.variables['quantization'],
    quantized().variables['quantization'],
  )
