import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from golden_vectors import assert_close
from models.random_variables import random_images, random_variables

from jaxlab.models import Hook, ResNet, ViT, apply
from jaxlab.quantizers.compensation import QwTv2, compensate
from jaxlab.quantizers.operands import TENSOR, affine_constants, edge_policy, percentile_ptq
from jaxlab.quantizers.repq import repq

X = random_images((16, 8, 8, 3))
BATCHES = [X[:8], X[8:]]
POLICY = edge_policy(2, 3)


def networks():
  vit = ViT(patch_size=4, image_size=8, width=8, depth=1, num_heads=2, num_classes=3)
  yield vit, repq(vit, random_variables(vit, X), X, POLICY)
  resnet = ResNet(stage_sizes=(1, 1), width=4, strides=(1, 2), stem='cifar', num_classes=3)
  yield resnet, percentile_ptq(resnet, random_variables(resnet, X), X, POLICY)


def constants(variables):
  return traverse_util.flatten_dict(dict(variables['quantization']), sep='/')


def test_ranges_of_inputs_are_those_of_what_flows_in_the_compensated_network():
  for model, quantized in networks():
    result = compensate(model, quantized, BATCHES, QwTv2(), dtype=jnp.float32)
    own, old = constants(result.variables), constants(quantized.variables)
    inputs = [
      name.removesuffix('/input/zero_point') for name in own if name.endswith('input/zero_point')
    ]
    inside = [path for path in inputs if path.startswith(('blocks', 'layer'))]
    assert len(inside) >= 5 and own.keys() == old.keys()

    def keep(site, call, x, *args, **kwargs):
      site.write('x', x)
      return call(x, *args, **kwargs)

    hooks = [*result.hooks, Hook('|'.join(inside), call=keep, collection='seen')]
    run = jax.jit(
      lambda v, model=model, hooks=hooks: apply(
        model, v, BATCHES[0], hooks=hooks, mutable=['seen']
      )[1]
    )
    seen = traverse_util.flatten_dict(run(result.variables)['seen'], sep='/')
    for path in inside:
      expected = affine_constants(TENSOR, seen[f'{path}/x'], 3)
      assert_close(own[f'{path}/input/scale'], expected['scale'], 1e-5)
      assert_close(own[f'{path}/input/zero_point'], expected['zero_point'], 1e-5, atol=1e-6)
    outside = [name for name in own if name.split('/')[0] in ('head', 'fc', 'conv1', 'patch_embed')]
    kernels = [name for name in own if '/kernel/' in name]
    for name in (*outside, *kernels):
      assert np.array_equal(own[name], old[name])


def test_ranges_stay_where_that_is_asked_for():
  model, quantized = next(networks())
  result = compensate(model, quantized, BATCHES, QwTv2(recalibrate=False), dtype=jnp.float32)
  jax.tree.map(
    np.testing.assert_array_equal,
    result.variables['quantization'],
    quantized.variables['quantization'],
  )
