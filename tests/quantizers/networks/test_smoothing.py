"""SmoothQuant by float64 NumPy, and on networks whose norms other things read, too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn
from models.random_variables import random_images, random_variables, run_capture

from jaxlab import models
from jaxlab.models import GPT2, Anatomy, Llama, Norm, Swin, ViT
from jaxlab.quantizers import absmax_ptq, smooth_norms, uniform_rules

IMAGES = random_images((8, 16, 16, 3))
TOKENS = np.random.default_rng(0).integers(0, 11, (8, 8)).astype(np.int32)
NETWORKS = {
  'vit': (ViT(8, 16, 16, 2, 2, num_classes=3), IMAGES),
  'swin': (Swin(2, 16, 4, 8, (1, 1), (2, 2), num_classes=3), IMAGES),
  'gpt2': (GPT2(11, 8, 16, 2, 2), TOKENS),
  'llama': (
    Llama(width=16, depth=1, num_heads=2, num_kv_heads=1, vocab_size=11, max_length=8, hidden=8),
    TOKENS,
  ),
}


def outlying(name):
  """Variables with norms that scale one channel up by 40."""
  model, x = NETWORKS[name]
  variables = random_variables(model, x)
  for norm in models.anatomy(model).norms:
    if norm.readers:
      *path, last = norm.path.split('/')
      tree = variables['params']
      for key in path:
        tree = tree[key]
      for own in tree[last]:
        tree[last][own][3] *= 40
  return model, variables, x


def below(tree, path):
  for key in path.split('/'):
    tree = tree[key]
  return tree


def captured(model, params, path, x):
  return np.asarray(run_capture(model, {'params': params}, [path], x)[1][path], np.float64)


@pytest.mark.parametrize('name', tables.few(NETWORKS, 'gpt2'))
@pytest.mark.parametrize('alpha', tables.first([0.5, 0.8]))
def test_norms_and_readers_are_scaled_by_the_formula(name, alpha):
  model, variables, x = outlying(name)
  batches = list(x.reshape(2, 4, *x.shape[1:]))
  smooth = smooth_norms(model, variables, batches, alpha=alpha)
  before, after = variables['params'], smooth['params']
  head = models.anatomy(model).head
  norms = [n for n in models.anatomy(model).norms if n.readers and not set(n.readers) & set(head)]
  assert norms
  for norm in norms:
    values = captured(model, before, norm.path, x)
    activations = np.abs(values).reshape(-1, values.shape[-1]).max(0)
    kernels = [np.asarray(below(before, r)['kernel'], np.float64) for r in norm.readers]
    weights = np.max([np.abs(k).max(1) for k in kernels], 0)
    scale = activations**alpha / weights ** (1 - alpha)
    for own, leaf in below(before, norm.path).items():
      np.testing.assert_allclose(below(after, norm.path)[own], leaf / scale, rtol=1e-4)
    for reader, kernel in zip(norm.readers, kernels):
      found = below(after, reader)['kernel']
      np.testing.assert_allclose(found, kernel * scale[:, None], rtol=1e-4)
  exact = jax.jit(model.apply)(variables, x)
  np.testing.assert_allclose(jax.jit(model.apply)(smooth, x), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('name', tables.few(['vit', 'gpt2'], 'gpt2'))
def test_outliers_that_small_weights_read_no_longer_spoil_the_range(name):
  model, variables, x = outlying(name)
  for norm in models.anatomy(model).norms:
    for reader in norm.readers if name == 'vit' or norm.path != 'ln_f' else ():
      below(variables['params'], reader)['kernel'][3] /= 40
  inside = f'({models.any_of(models.anatomy(model).block_paths)})/.*'
  rules = uniform_rules(6, inputs=6, path=inside)
  exact = jax.jit(model.apply)(variables, x)
  errors = [
    np.mean((absmax_ptq(model, own, x, rules)(x) - exact) ** 2)
    for own in (variables, smooth_norms(model, variables, x))
  ]
  assert errors[1] < errors[0] / 3


def test_dead_channels_stay_finite_and_traced_variables_are_smoothed():
  model, variables, x = outlying('vit')
  norm, fc1 = (
    variables['params']['blocks_0']['norm2'],
    variables['params']['blocks_0']['mlp']['fc1'],
  )
  norm['scale'][1] = norm['bias'][1] = 0
  fc1['kernel'][2] = 0
  smooth = jax.jit(lambda variables, x: smooth_norms(model, variables, x))(variables, x)
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(smooth))
  exact = model.apply(variables, x)
  np.testing.assert_allclose(model.apply(smooth, x), exact, rtol=1e-3, atol=1e-3)


class Residual(nn.Module):
  """A norm that the residual sum reads, too."""

  @nn.compact
  def __call__(self, x):
    y = nn.LayerNorm(name='norm')(x)
    return y + nn.Dense(6, name='fc')(y)


def test_what_cannot_be_done_is_named():
  model, variables, x = outlying('vit')
  for options, message in (
    ({'alpha': 1.5}, r'alpha must lie in \[0, 1\], got 1.5'),
    ({'pairs': [('norm7', 'mlp/fc1')]}, 'norm7'),
    ({'anatomy': Anatomy()}, 'no norm that layers alone read'),
    ({'batches': []}, 'batches is empty'),
    ({'batches': jnp.full((2, 16, 16, 3), jnp.nan)}, "'blocks_0/norm1' returns is not finite"),
  ):
    with pytest.raises(ValueError, match=message):
      smooth_norms(model, variables, **{'batches': x, **options})
  scanned = model.clone(scan=True)
  with pytest.raises(ValueError, match='stacked'):
    smooth_norms(scanned, random_variables(scanned, x), x)
  rows = np.random.default_rng(0).standard_normal((9, 6)).astype(np.float32)
  own = Residual()
  parts = Anatomy(norms=[Norm('norm', readers=['fc'])])
  with pytest.raises(ValueError, match=r"Rescaling 'norm' .* moves the outputs"):
    smooth_norms(own, random_variables(own, rows), rows, anatomy=parts)


def rounded_dot(a, b, dimensions, precision=None, preferred_element_type=None):
  """A TPU's product of float32 operands, which are rounded to bfloat16 unless more is asked for."""
  if precision is None and jax.config.jax_default_matmul_precision != 'highest':
    a, b = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (a, b))
  return jax.lax.dot_general(a, b, dimensions, precision, preferred_element_type)


class Rounding(nn.Module):
  """A norm and its reader on an accelerator."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4, dot_general=rounded_dot, name='fc')(nn.LayerNorm(name='norm')(x))


@pytest.mark.exhaustive
def test_products_of_an_accelerator_do_not_hide_that_the_function_stays():
  model, x = Rounding(), np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
  variables = random_variables(model, x)
  smooth = smooth_norms(model, variables, x, pairs=[('norm', 'fc')])
  moved = np.abs(model.apply(smooth, x) - model.apply(variables, x)).max()
  assert moved > 1e-3 * np.abs(model.apply(variables, x)).max()
  with jax.default_matmul_precision('highest'):
    np.testing.assert_allclose(model.apply(smooth, x), model.apply(variables, x), atol=1e-4)
