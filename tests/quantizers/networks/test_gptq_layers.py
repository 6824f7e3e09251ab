"""GPTQ on every kind of linear layer: its rows are what the kernel multiplies, and all its calls count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn
from models.random_variables import random_variables

from jaxlab.models import Anatomy, Hook, apply
from jaxlab.quantizers import Rule, gptq_kernel, gptq_ptq, uniform_rules
from jaxlab.quantizers.networks.layer_inputs import LayerRows, kernel_layout

RNG = np.random.default_rng(0)
LAYERS = {
  'dense': (nn.Dense(5), (4, 3, 6)),
  'heads': (nn.DenseGeneral((2, 3)), (4, 3, 6)),
  'from heads': (nn.DenseGeneral(5, axis=(-2, -1)), (4, 3, 2, 3)),
  'inner axis': (nn.DenseGeneral(5, axis=-2), (4, 6, 3)),
  'conv 1-D': (nn.Conv(5, (3,)), (4, 7, 2)),
  'conv 2-D': (nn.Conv(5, (3, 2), strides=2, kernel_dilation=2), (4, 7, 6, 2)),
  'conv 3-D': (nn.Conv(5, (2, 2, 1)), (4, 3, 4, 2, 2)),
  'circular': (nn.Conv(5, (3, 3), padding='CIRCULAR'), (4, 5, 4, 2)),
  'reflect': (nn.Conv(5, (3,), padding='REFLECT'), (4, 7, 2)),
  'causal': (nn.Conv(5, (3,), padding='CAUSAL', kernel_dilation=2), (4, 7, 2)),
  'input dilation': (nn.Conv(5, (3, 3), input_dilation=(2, 1), padding=1), (4, 4, 3, 2)),
  'grouped': (nn.Conv(6, (3, 3), feature_group_count=2), (4, 5, 4, 4)),
  'depthwise': (nn.Conv(4, (3, 3), feature_group_count=4), (4, 5, 4, 4)),
  'transposed': (nn.ConvTranspose(5, (3, 3), strides=(2, 2)), (4, 3, 4, 2)),
  'transposed kernel': (
    nn.ConvTranspose(5, (3, 2), strides=(2, 2), transpose_kernel=True), (4, 3, 4, 2)
  ),
}  # fmt: skip


class Around(nn.Module):
  """A block with one layer."""

  kind: nn.Module

  @nn.compact
  def __call__(self, x):
    return self.kind.clone(name='layer', parent=self)(inputs=x)


class Network(nn.Module):
  """One block."""

  kind: nn.Module

  @nn.compact
  def __call__(self, x):
    return Around(self.kind.clone(parent=None), name='block')(x)


@pytest.mark.parametrize(
  'name',
  tables.few(LAYERS, 'from heads', 'conv 2-D', 'depthwise', 'transposed kernel'),
)
def test_rows_times_the_kernel_are_the_layer(name):
  layer, shape = LAYERS[name]
  x = RNG.normal(size=shape).astype(np.float32)
  variables = random_variables(layer, x)
  found, layer_rows = {}, LayerRows()

  def visit(site, call, x):
    if layer_rows.running:
      return call(x)
    kernel = site.module.scope.get_variable('params', 'kernel')
    layout = kernel_layout(site, kernel)
    plain, rows = layout.plain(kernel), layer_rows(site, x, kernel)
    plain = plain if layout.groups > 1 else plain[None]
    flat = jnp.moveaxis(plain, -2, 1).reshape(len(plain), -1, plain.shape[-1])
    rows = rows if layout.groups > 1 else rows[..., None, :]
    y = jnp.einsum('...gi,gio->...go', rows, flat, precision='highest')
    found['y'], found['kernel'] = y, layout.restore(layout.plain(kernel), kernel.shape)
    return call(x)

  y = apply(layer, variables, x, hooks=[Hook('', call=visit)]) - variables['params']['bias']
  np.testing.assert_allclose(np.reshape(found['y'], y.shape), y, atol=1e-5)
  np.testing.assert_array_equal(found['kernel'], variables['params']['kernel'])


@pytest.mark.parametrize('name', tables.few(LAYERS, 'conv 2-D'))
def test_the_output_on_the_calibration_data_is_nearer_than_that_of_rounding(name):
  layer, shape = LAYERS[name]
  model = Network(layer)
  noise = RNG.normal(size=(8 * shape[0], *shape[1:]))
  x = (noise + 3 * RNG.normal(size=(len(noise), *[1] * (len(shape) - 1)))).astype(np.float32)
  variables = random_variables(model, x)
  options = {'anatomy': Anatomy(blocks=('block',))}
  rules = [Rule('block/layer', 'kernel', 2)]
  found = gptq_ptq(model, variables, [x[:16], x[16:]], rules, **options)
  assert not found.rounded
  blind = gptq_ptq(model, variables, np.zeros_like(x), rules, **options)
  assert blind.rounded == {'block/layer': 'no calibration input reached it'}
  right = model.apply(variables, x)
  errors = [np.mean((np.asarray(own(x)) - right) ** 2) for own in (found, blind)]
  assert errors[0] < 0.8 * errors[1]
  assert np.any(blind.variables['params']['block']['layer']['kernel'])


class Twice(nn.Module):
  """A layer called twice, once in what is computed again in the backward pass."""

  @nn.compact
  def __call__(self, x):
    layer = nn.Dense(6, name='layer')
    again = nn.remat(lambda layer, x: layer(x))
    return nn.Dense(6, name='unused')(0 * x) + layer(again(layer, x) ** 2)


def test_the_hessian_is_that_of_all_calls_and_what_no_input_reached_is_named():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3, name='head')(Twice(name='block')(x))

  model, x = Model(), RNG.normal(size=(32, 4, 6)).astype(np.float32)
  variables = random_variables(model, x)
  found = gptq_ptq(
    model, variables, [x[:20], x[20:]], uniform_rules(3), anatomy=Anatomy(blocks=('block',))
  )
  own = variables['params']['block']['layer']
  rows = x.reshape(-1, 6).astype(np.float64)
  rows = np.concatenate([rows, (rows @ own['kernel'] + own['bias']) ** 2])
  hessian = jnp.asarray(2 / 32 * rows.T @ rows / 2, jnp.float32)
  right = gptq_kernel(jnp.asarray(own['kernel']), hessian, 3)
  kernel = found.variables['params']['block']['layer']['kernel']
  np.testing.assert_allclose(kernel, right.kernel, atol=1e-4)
  once = gptq_kernel(
    jnp.asarray(own['kernel']), jnp.asarray(x.reshape(-1, 6).T @ x.reshape(-1, 6)), 3
  )
  assert np.max(np.abs(once.kernel - kernel)) > 0.01
  assert dict(found.rounded) == {
    'block/unused': 'no calibration input reached it',
    'head': 'it lies outside of the blocks',
  }
  nearest = gptq_kernel(
    jnp.asarray(variables['params']['block']['unused']['kernel']), jnp.eye(6), 3
  )
  np.testing.assert_array_equal(
    found.variables['params']['block']['unused']['kernel'], nearest.kernel
  )
  leaves, treedef = jax.tree.flatten(found)
  assert jax.tree.unflatten(treedef, leaves).rounded == found.rounded


def test_a_layer_that_is_no_matrix_is_named():
  for layer, shape, reason in (
    (nn.Conv(4, (3,), mask=np.ones((3, 2, 4))), (2, 5, 2), 'a mask is over its kernel'),
    (nn.DenseGeneral(4, batch_dims=(0,)), (2, 5, 2), 'batch_dims have kernels of their own'),
    (nn.ConvLocal(4, (3,)), (2, 5, 2), r'kernel \[5, 6, 4\] is no matrix'),
  ):
    model, x = Network(layer), RNG.normal(size=shape).astype(np.float32)
    variables = random_variables(model, x)
    with pytest.raises(ValueError, match=f"kernel of 'block/layer' .* multiplies: .*{reason}"):
      gptq_ptq(model, variables, x, uniform_rules(3), anatomy=Anatomy(blocks=('block',)))
