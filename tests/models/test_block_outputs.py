import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from golden_vectors import assert_close
from models.random_variables import random_images, random_variables, run_capture

from jaxlab import losses, models
from jaxlab.models import GPT2, Anatomy, Block, Hook, Llama, Swin, ViT, stack_blocks

IMAGES = random_images((4, 16, 16, 3))
TOKENS = np.random.default_rng(0).integers(0, 11, (4, 8)).astype(np.int32)
DECODER = {'width': 16, 'depth': 2, 'num_heads': 2, 'vocab_size': 11, 'max_length': 8}
NETWORKS = {
  'vit': (ViT(8, 16, 16, 3, 2, num_classes=3), IMAGES, [(4, 5, 16)] * 3),
  'swin': (
    Swin(2, 16, 4, 8, (1, 2), (2, 2), num_classes=3),
    IMAGES,
    [(4, 8, 8, 8), (4, 4, 4, 16), (4, 4, 4, 16)],
  ),
  'gpt2': (GPT2(**DECODER), TOKENS, [(4, 8, 16)] * 2),
}


def penalty_of(model, x):
  parts = models.anatomy(model)

  def penalty(params):
    patterns = [models.any_of(parts.block_paths)]
    y, captured = models.capture(model, {'params': params}, patterns, x)
    outputs = models.block_outputs(captured, parts)
    return losses.tweo_loss(outputs, tau=1.0) + jnp.mean(y**2), [y.shape for y in outputs]

  return penalty


def grads_of(model, x, params):
  return jax.jit(jax.value_and_grad(lambda params: penalty_of(model, x)(params)[0]))(params)


def assert_trees_close(actual, expected):
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
  jax.tree.map(lambda a, e: assert_close(a, e, 2e-5, atol=1e-6 * largest), actual, expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize('name', tables.few(NETWORKS, 'vit'))
def test_a_penalty_on_blocks_has_the_gradient_of_a_network_that_returns_them(name):
  model, x, shapes = NETWORKS[name]
  params = random_variables(model, x)['params']
  assert penalty_of(model, x)(params)[1] == shapes

  kept = []

  def keep(site, y):
    kept.append(y)
    return y

  def by_hand(params):
    kept.clear()
    hooks = [Hook(models.any_of(models.anatomy(model).block_paths), output=keep)]
    y = models.apply(model, {'params': params}, x, hooks=hooks)
    costs = [jnp.mean((jnp.abs(y) / (1 + 1e-6)) ** 4) for y in kept]
    return sum(costs) / len(costs) + jnp.mean(y**2)

  expected, expected_grads = jax.jit(jax.value_and_grad(by_hand))(params)
  value, grads = grads_of(model, x, params)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert_trees_close(grads, expected_grads)


@pytest.mark.exhaustive
@pytest.mark.parametrize('name', tables.few(NETWORKS, 'vit'))
def test_remat_changes_neither_penalty_nor_gradient(name):
  model, x, _ = NETWORKS[name]
  params = random_variables(model, x)['params']
  value, grads = grads_of(model, x, params)
  remat_value, remat_grads = grads_of(model.clone(remat=True), x, params)
  np.testing.assert_allclose(remat_value, value, rtol=1e-6)
  assert_trees_close(remat_grads, grads)


@pytest.mark.parametrize('remat', tables.few([False, True], True))
def test_scanned_blocks_count_each(remat):
  model, x, _ = NETWORKS['vit']
  params = random_variables(model, x)['params']
  value, grads = grads_of(model, x, params)
  scanned = model.clone(scan=True, remat=remat)
  scan_value, scan_grads = grads_of(scanned, x, stack_blocks(params))
  np.testing.assert_allclose(scan_value, value, rtol=1e-5)
  assert_trees_close(scan_grads, stack_blocks(grads))


def test_a_stack_among_others_is_taken_apart():
  parts = Anatomy(blocks=(Block('first'), Block('rest', stacked=2)))
  outputs = models.block_outputs({'rest': np.arange(2), 'first': np.full((), 7), 'fc': 0}, parts)
  assert [int(y) for y in outputs] == [7, 0, 1]


@pytest.mark.parametrize('name', [*NETWORKS, 'llama'])
def test_the_residual_stream_is_what_every_addition_hands_on(name):
  model, x, _ = NETWORKS.get(name, (Llama(**DECODER, hidden=24), TOKENS, None))
  variables = random_variables(model, x)
  parts = models.anatomy(model)
  assert parts.stream == tuple(p for b in parts.block_paths for p in (f'{b}/residual', b))
  patterns = [models.any_of([*parts.stream, *(n.path for n in parts.norms)]), r'.*(mlp)']
  _, captured = run_capture(model, variables, patterns, x)
  for block in parts.blocks:
    between = captured[f'{block.path}/residual']
    np.testing.assert_allclose(
      captured[block.path], between + captured[f'{block.path}/mlp'], rtol=1e-5, atol=1e-6
    )


def test_what_is_missing_is_named():
  parts = models.anatomy(NETWORKS['vit'][0])
  with pytest.raises(
    ValueError, match=r"lacks the output of 'blocks_1', 'blocks_2'.*'blocks_0', 'fc'"
  ):
    models.block_outputs({'blocks_0': 1, 'fc': 2}, parts)
  with pytest.raises(ValueError, match='no blocks'):
    models.block_outputs({}, dataclasses.replace(parts, blocks=()))
