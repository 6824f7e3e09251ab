import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tables
from flax import linen as nn
from models.random_variables import random_images, random_variables

from jaxlab import models
from jaxlab.models import GPT2, Hook, Swin, ViT, stack_blocks
from jaxlab.models.normalization import LayerNorm
from jaxlab.parallel import batch_sharding, make_mesh
from jaxlab.quantizers import (
  PROBES,
  Float8Scales,
  float8_dot,
  float8_fake_quantize,
  float8_hooks,
  init_float8,
  merge_probes,
  split_probes,
)
from jaxlab.training import by_path, replace_by_gradient

IMAGES = random_images((8, 16, 16, 3))
TOKENS = np.random.default_rng(0).integers(0, 11, (8, 8)).astype(np.int32)
NETWORKS = {
  'vit': (ViT(8, 16, 16, 2, 2, num_classes=3), IMAGES),
  'swin': (Swin(2, 16, 4, 8, (1, 1), (2, 2), num_classes=3), IMAGES),
  'gpt2': (GPT2(11, 8, 16, 2, 2), TOKENS),
}
LAYERS = {
  'vit': {'head', *(f'blocks_{i}/{n}' for i in (0, 1) for n in ('attention/qkv', 'attention/proj',
  'mlp/fc1', 'mlp/fc2'))}, 'gpt2': {'wte', *(f'h_{i}/{n}' for i in (0, 1) for n in ('attn/c_attn',
  'attn/c_proj', 'mlp/c_fc', 'mlp/c_proj'))},
}  # fmt: skip


def paths_of(tree, name):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  keys = [[key.key for key in path] for path, _ in leaves]
  return {'/'.join(path[:-2]) for path in keys if path[-2:] == [name, 'scale']}


def start(name='vit', **options):
  model, x = NETWORKS[name]
  variables = random_variables(model, x)
  state, probes = init_float8(model, variables, x, **options)
  return model, x, merge_probes(variables['params'], probes), state


def run(model, params, state, x):
  variables = {'params': params, 'float8': state}
  y, changed = models.apply(model, variables, x, hooks=float8_hooks(), mutable=['float8'])
  return y, changed['float8']


@pytest.mark.parametrize('name', ['vit', 'gpt2'])
def test_every_linear_layer_norm_and_head_has_a_state_and_a_probe(name):
  model, x, params, state = start(name)
  assert paths_of(state, 'kernel') == LAYERS[name]
  norms = {norm.path for norm in models.anatomy(model).norms}
  assert paths_of(state, 'gradient') == LAYERS[name] | norms
  plain = init_float8(model, {'params': params}, x, norms=False)[0]
  assert paths_of(plain, 'gradient') == LAYERS[name]
  jax.tree.map(
    np.testing.assert_array_equal, split_probes(params), random_variables(model, x)['params']
  )


def test_a_layer_is_the_product_with_the_scales_of_the_steps_before():
  model, x, params, state = start(norms=False)
  step = jax.jit(lambda p, s: run(model, p, s, x))
  _, state = step(params, state)
  own = state['head']
  patterns = ['pool', 'head']
  captured = jax.jit(lambda v: models.capture(model, v, patterns, x, hooks=float8_hooks())[1])(
    {'params': params, 'float8': state}
  )
  head = params['head']
  assert own['kernel']['scale'] == np.float32(448) / np.float32(np.abs(head['kernel']).max())
  scales = Float8Scales(own['x']['scale'], own['kernel']['scale'], own['gradient']['scale'])
  expected = (
    float8_dot(captured['pool'], jnp.asarray(head['kernel']), scales, jnp.float32(0)) + head['bias']
  )
  np.testing.assert_allclose(captured['head'], expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(own['x']['history'][0], np.abs(captured['pool']).max(), rtol=0.2)
  assert not np.any(own['x']['history'][1:])


def test_the_norms_output_is_rounded():
  model, x, params, state = start()
  _, state = run(model, params, state, x)
  captured = models.capture(
    model, {'params': params, 'float8': state}, ['norm'], x, hooks=float8_hooks()
  )[1]['norm']
  scale = state['norm']['x']['scale']
  assert scale > 1
  np.testing.assert_array_equal(captured, float8_fake_quantize(captured, scale, jnp.float8_e4m3fn))


def train(name, steps, in_float8=True, model=None, params=None, sharding=None, **options):
  given, x, fresh, state = start(name, **options)
  model = given if model is None else model
  params = fresh if params is None else params
  x = x if sharding is None else jax.device_put(x, sharding)
  labels = TOKENS if name == 'gpt2' else np.arange(8) % 3
  own = optax.adamw(3e-3)
  optimizer = by_path([(PROBES, replace_by_gradient()), ('.*', own)]) if in_float8 else own
  params = params if in_float8 else split_probes(params)

  def loss(params, state, x):
    if in_float8:
      y, state = run(model, params, state, x)
    else:
      y = model.apply({'params': params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(y, labels).mean(), state

  @jax.jit
  def step(params, state, opt_state, x):
    (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params, state, x)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), state, opt_state, value

  opt_state, values = optimizer.init(params), []
  for _ in range(steps):
    params, state, opt_state, value = step(params, state, opt_state, x)
    values.append(float(value))
  return params, state, values


@pytest.mark.exhaustive
@pytest.mark.parametrize('name', tables.few(NETWORKS, 'gpt2'))
def test_training_follows_the_loss_in_float(name):
  _, state, values = train(name, 25)
  _, _, exact = train(name, 25, in_float8=False)
  assert values[-1] < 0.7 * values[0]
  # Before the first maxima the scales are 1: the first steps are rough.
  np.testing.assert_allclose(values[5:], exact[5:], rtol=0.1, atol=0.03)
  scales = [
    leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if path[-1].key == 'scale'
  ]
  assert all(np.all(np.isfinite(s)) and np.all(s > 0) and np.all(s != 1) for s in scales)


@pytest.mark.exhaustive
def test_the_gradients_maximum_arrives_in_the_next_steps_history():
  model, x, params, state = start()

  def loss(params):
    y, changed = run(model, params, state, x)
    return jnp.sum(y**2), changed

  grads, _ = jax.jit(jax.grad(loss, has_aux=True))(params)
  amax = grads['head']['float8_gradient']
  y, _ = run(model, params, state, x)
  np.testing.assert_allclose(amax, np.abs(2 * y).max(), rtol=1e-5)
  optimizer = by_path([(PROBES, replace_by_gradient()), ('.*', optax.set_to_zero())])
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  moved = optax.apply_updates(params, updates)
  np.testing.assert_array_equal(moved['head']['kernel'], params['head']['kernel'])
  _, after = run(model, moved, state, x)
  np.testing.assert_allclose(after['head']['gradient']['history'][0], amax, rtol=1e-6)
  np.testing.assert_allclose(after['head']['gradient']['scale'], 57344 / amax, rtol=1e-6)


class Twice(nn.Module):
  """A layer and a norm that are called twice, on values and gradients of different size."""

  remat: bool = False

  @nn.compact
  def __call__(self, x):
    dense = nn.remat(nn.Dense) if self.remat else nn.Dense
    dense, norm = dense(4, name='dense'), LayerNorm(name='norm')
    h = norm(dense(x))
    return norm(3 * dense(10 * h))


@pytest.mark.exhaustive
@pytest.mark.parametrize('remat', tables.few([False, True], True))
def test_a_module_that_is_called_twice_pushes_the_maximum_of_both_calls_once(remat):
  model = Twice(remat)
  x = random_images((5, 4))
  variables = random_variables(model, x)
  state, probes = init_float8(model, variables, x)
  assert probes['dense']['float8_gradient'].shape == (2,)
  params = merge_probes(variables['params'], probes)

  def loss(params, state, x):
    y, changed = run(model, params, state, x)
    return jnp.sum(y[:, 0] ** 3), changed

  steps = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (_, first), grads = steps(params, state, x)
  # The same pass with float64's eyes: what enters both calls, by zeros that are added there.
  zeros = [np.zeros((5, 4), np.float32)] * 2

  def watched(shifts, state):
    calls = []

    def visit(site, call, y):
      calls.append(y)
      return call(y) + shifts[len(calls) - 1]

    hooks = [*float8_hooks(), Hook('dense', call=visit)]
    given = {'params': params, 'float8': state}
    y, _ = models.apply(Twice(), given, x, hooks=hooks, mutable=['float8'])
    return jnp.sum(y[:, 0] ** 3), calls

  for before, after in ((state, first), (first, steps(params, first, x)[0][1])):
    slopes, seen = jax.grad(watched, has_aux=True)(zeros, before)
    own = after['dense']
    largest = max(np.abs(np.asarray(y, np.float64)).max() for y in seen)
    np.testing.assert_allclose(own['x']['history'][0], largest, rtol=1e-6)
    np.testing.assert_array_equal(own['x']['history'][1:], before['dense']['x']['history'][:-1])
    np.testing.assert_array_equal(
      own['kernel']['history'][1:], before['dense']['kernel']['history'][:-1]
    )
    np.testing.assert_allclose(own['kernel']['history'][0], np.abs(params['dense']['kernel']).max())
    np.testing.assert_allclose(own['x']['scale'], 448 / own['x']['history'].max(), rtol=1e-6)
    if before is state:  # gradients of the first step, one number a call
      sizes = [np.abs(np.asarray(g, np.float64)).max() for g in slopes]
      np.testing.assert_allclose(grads['dense']['float8_gradient'], sizes, rtol=1e-5)
  moved = jax.tree.map(jnp.copy, params)
  moved['dense']['float8_gradient'] = grads['dense']['float8_gradient']
  after = steps(moved, first, x)[0][1]['dense']['gradient']
  np.testing.assert_allclose(after['history'][:2], [max(sizes), 0], rtol=1e-5)
  np.testing.assert_allclose(after['scale'], 57344 / max(sizes), rtol=1e-5)


@pytest.mark.exhaustive
def test_remat_and_scan_are_the_plain_network():
  model, _, params, _ = start()
  _, plain_state, plain = train('vit', 3)
  _, state, values = train('vit', 3, model=model.clone(remat=True))
  np.testing.assert_allclose(values, plain, rtol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05), state, plain_state)
  scanned = model.clone(scan=True)
  variables = {'params': stack_blocks(split_probes(params))}
  stacked_state, probes = init_float8(scanned, variables, IMAGES)
  jax.tree.map(np.testing.assert_array_equal, stacked_state, stack_blocks(start()[3]))
  merged = merge_probes(variables['params'], probes)
  jax.tree.map(np.testing.assert_array_equal, merged, stack_blocks(params))
  y, changed = run(scanned, merged, stacked_state, IMAGES)
  expected, new = run(model, params, start()[3], IMAGES)
  np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2), changed, stack_blocks(new))


@pytest.mark.exhaustive
def test_the_state_is_that_of_the_global_batch():
  _, state, values = train('vit', 2)
  _, split, again = train('vit', 2, sharding=batch_sharding(make_mesh()))
  np.testing.assert_allclose(again, values, rtol=1e-3)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05), split, state)


def test_evaluation_leaves_the_state_alone_and_probes_out():
  model, x, params, state = start()
  _, state = run(model, params, state, x)
  y = models.apply(model, {'params': params, 'float8': state}, x, hooks=float8_hooks())
  assert y.shape == (8, 3)
  exact = model.apply({'params': split_probes(params)}, x)
  assert 0 < np.mean((y - exact) ** 2) < 0.05 * np.var(exact)
  assert float8_hooks() is float8_hooks()


def test_bad_arguments_are_named():
  model, x, params, state = start()
  with pytest.raises(ValueError, match="layers='tail' matches no linear layer of ViT"):
    init_float8(model, {'params': params}, x, layers='tail')
  with pytest.raises(ValueError, match='length must be positive'):
    init_float8(model, {'params': params}, x, history=0)
  with pytest.raises(ValueError, match="has no probe 'float8_gradient'"):
    run(model, split_probes(params), state, x)
  with pytest.raises(ValueError, match='needs the parameters'):
    replace_by_gradient().update(params, replace_by_gradient().init(params))
