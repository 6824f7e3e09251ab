import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from golden_vectors import assert_close, golden
from models.random_variables import random_images as images
from models.random_variables import random_variables as init
from models.random_variables import run, run_capture

from jaxlab.models import (
  ViT,
  apply,
  from_torch,
  module_paths,
  stack_blocks,
  unstack_blocks,
)
from jaxlab.models.intercept import Hook
from jaxlab.models.position_embedding import resample_position_embedding
from jaxlab.models.vit import Block, draw_survival

TINY = {'patch_size': 4, 'image_size': 8, 'width': 12, 'depth': 2, 'num_heads': 2, 'num_classes': 5}


def abstract64(model, x):
  tree = jax.eval_shape(model.init, jax.random.key(0), x)
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, x.dtype), tree)


@golden('idmm', 'vit_forward')
@pytest.mark.parametrize('dtype, rtol', [('float64', 1e-9), ('float32', 1e-5)])
def test_small_network_agrees_with_reference(vectors, dtype, rtol):
  state_dict = vectors.tree('param__')
  with jax.enable_x64(dtype == 'float64'):
    x = jnp.asarray(vectors['in_images_nchw'].transpose(0, 2, 3, 1), dtype)
    model = ViT(
      patch_size=vectors.param('patch_size'),
      image_size=x.shape[1:3],
      width=state_dict['cls_token'].shape[-1],
      depth=vectors.param('depth'),
      num_heads=vectors.param('num_heads'),
      mlp_ratio=len(state_dict['blocks.0.mlp.fc1.bias']) / state_dict['cls_token'].shape[-1],
      num_classes=len(state_dict['head.bias']),
    )
    variables = from_torch(abstract64(model, x), state_dict)
    logits, captured = run_capture(model, variables, ['norm'], x)
    assert_close(logits, vectors['out_logits'], rtol)
    assert_close(captured['norm'][:, 0], vectors['out_cls_feature'], rtol)
    assert_close(captured['norm'][:, 1:], vectors['out_patch_tokens'], rtol)


@golden('peft_protocols', 'vit_block')
@pytest.mark.parametrize('dtype, rtol', [('float64', 1e-9), ('float32', 1e-5)])
def test_block_and_its_gradient_agree_with_reference(vectors, dtype, rtol):
  with jax.enable_x64(dtype == 'float64'):
    x = jnp.asarray(vectors['in_x'], dtype)
    own = vectors.tree('param_')
    arrays = {k: v for k, v in own.items() if k.endswith(('_weight', '_bias'))}
    dotted = {
      k.replace('attn_', 'attn.')
      .replace('mlp_', 'mlp.')
      .replace('_weight', '.weight')
      .replace('_bias', '.bias'): v
      for k, v in arrays.items()
    }
    block = Block(
      vectors.param('num_heads'), len(arrays['mlp_fc1_bias']) / x.shape[-1],
      'attn_qkv_bias' in arrays, epsilon=vectors.param('layer_norm_eps'),
    )  # fmt: skip
    renames = ((r'^attention\.', 'attn.'),)
    variables = from_torch(abstract64(block, x), dotted, renames=renames)
    cosines = np.cos(np.arange(x.size)).reshape(x.shape)

    def weighted(x):
      y = block.apply(variables, x)
      return jnp.sum(y * cosines), y

    gradient, y = jax.jit(jax.grad(weighted, has_aux=True))(x)
    assert_close(y, vectors['out_y'], rtol)
    assert_close(gradient, vectors['grad_x'], rtol)


def test_modules_carry_timms_names_and_hook_points():
  paths = module_paths(ViT(**{**TINY, 'depth': 1}, distilled=True), images())
  attention = [f'attention/{name}' for name in ('qkv', 'query', 'key', 'value', 'softmax', 'proj')]
  mlp = ['norm2', 'mlp', 'mlp/fc1', 'mlp/gelu', 'mlp/fc2']
  block = ['norm1', 'attention', *attention, 'residual', *mlp]
  assert paths == [
    *('patch_embed', 'patch_embed/proj', 'blocks_0'),
    *(f'blocks_0/{name}' for name in block),
    *('norm', 'pool', 'head', 'head_dist'),
  ]


def loss_and_gradient(model, params):
  def loss(params):
    rngs = {'drop_path': jax.random.key(7)}
    return jnp.sum(jnp.sin(model.apply({'params': params}, images(), True, rngs=rngs)))

  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope='module')
def plain():
  model = ViT(**TINY, drop_path=0.5)
  params = init(model, images())['params']
  return params, *loss_and_gradient(model, params)


@pytest.mark.parametrize('scan, remat', tables.first([(True, True), (False, True), (True, False)]))
def test_scan_and_remat_give_the_same_outputs_and_gradients(plain, scan, remat):
  params, expected_value, expected_gradient = plain
  model = ViT(**TINY, drop_path=0.5, scan=scan, remat=remat)
  convert, back = (stack_blocks, unstack_blocks) if scan else (dict, dict)
  own = init(model, images())['params']
  assert jax.tree.map(np.shape, convert(params)) == jax.tree.map(np.shape, own)
  value, gradient = loss_and_gradient(model, convert(params))
  assert_close(value, expected_value, 1e-5)
  gradient = back(gradient)
  for path, leaf in jax.tree_util.tree_leaves_with_path(expected_gradient):
    own = gradient
    for key in path:
      own = own[key.key]
    assert_close(own, leaf, 1e-4, 1e-6)


def test_stacking_round_trips_and_names_what_is_wrong():
  params = init(ViT(**TINY), images())['params']
  back = unstack_blocks(stack_blocks(params))
  assert jax.tree.structure(back) == jax.tree.structure(dict(params))
  jax.tree.map(np.testing.assert_array_equal, back, dict(params))
  with pytest.raises(ValueError, match='needs blocks_0, blocks_1'):
    stack_blocks({'head': params['head']})
  with pytest.raises(ValueError, match='needs blocks_0, blocks_1'):
    stack_blocks({name: value for name, value in params.items() if name != 'blocks_0'})
  with pytest.raises(ValueError, match="needs a subtree 'blocks'"):
    unstack_blocks(params)


def test_distilled_network_returns_both_logits_in_training_and_their_mean_otherwise():
  x = images()
  model = ViT(**TINY, distilled=True)
  variables = init(model, x)
  own, distilled = run(model, variables, x, True)[0]
  assert float(jnp.abs(own - distilled).max()) > 0.1
  assert_close(run(model, variables, x), (own + distilled) / 2, 1e-6)


def test_features_are_the_pooled_normalized_tokens():
  x = images()
  for options, pool in (
    ({}, lambda tokens: tokens[:, 0]),
    ({'pooling': 'mean'}, lambda tokens: tokens[:, 1:].mean(1)),
    ({'pooling': 'mean', 'registers': 2}, lambda tokens: tokens[:, 3:].mean(1)),
    ({'distilled': True}, lambda tokens: tokens[:, :2].mean(1)),
  ):
    model = ViT(**{**TINY, 'num_classes': None}, **options)
    y, captured = run_capture(model, init(model, x), ['norm'], x)
    assert_close(y, pool(captured['norm']), 1e-6)


def test_drop_path_drops_whole_branches_and_keeps_the_mean():
  rates = np.linspace(0, 0.5, 3)
  factors = np.asarray(draw_survival(jax.random.key(0), rates, 4000))
  assert factors.shape == (3, 2, 4000)
  np.testing.assert_array_equal(factors[0], 1)
  for rate, row in zip(rates[1:], factors[1:], strict=True):
    np.testing.assert_allclose(np.unique(row), [0, 1 / (1 - rate)], rtol=1e-6)
    assert abs(row.mean() - 1) < 0.05
  assert abs(np.corrcoef(factors[2])[0, 1]) < 0.05

  x = images()
  model = ViT(**TINY, drop_path=0.5)
  variables = init(model, x)

  @jax.jit
  def train(seed):
    return model.apply(variables, x, True, rngs={'drop_path': jax.random.key(seed)})

  np.testing.assert_array_equal(train(0), train(0))
  assert float(jnp.abs(train(0) - train(1)).max()) > 1e-3
  assert_close(run(model, variables, x), run(ViT(**TINY), variables, x), 1e-7)
  tokens = images((2, 5, 12))
  y = jax.jit(Block(2).apply)(init(Block(2), tokens), tokens, jnp.zeros((2, 2)))
  np.testing.assert_array_equal(y, tokens)


def test_other_image_sizes_resample_the_position_embedding():
  model = ViT(**TINY)
  variables = init(model, images())
  larger = images((2, 16, 12, 3))
  with pytest.raises(ValueError, match=r'got \(16, 12\): give image_size'):
    run(model, variables, larger)
  dynamic = ViT(**TINY, dynamic_image_size=True)
  params = variables['params']
  params = {**params, 'pos_embed': resample_position_embedding(params['pos_embed'], (4, 3))}
  stored = ViT(**{**TINY, 'image_size': (16, 12)})
  assert_close(run(dynamic, variables, larger), run(stored, {'params': params}, larger), 1e-6)


def test_softmax_hook_sees_probabilities_and_query_hook_changes_attention():
  x = images()
  model = ViT(**TINY)
  hooks = [
    Hook(r'blocks_1/attention/query', output=lambda site, q: 0 * q),
    Hook('.*/softmax', output=lambda site, w: site.write('weights', w) or w),
  ]
  run_hooked = jax.jit(lambda v, x: apply(model, v, x, hooks=hooks, mutable=['hooks']))
  _, state = run_hooked(init(model, x), x)
  weights = [state['hooks'][f'blocks_{i}']['attention']['softmax']['weights'] for i in (0, 1)]
  assert weights[0].shape == (3, 2, 5, 5)
  assert_close(weights[0].sum(-1), jnp.ones((3, 2, 5)), 1e-5)
  assert float(jnp.abs(weights[0] - 0.2).max()) > 0.05
  assert_close(weights[1], jnp.full((3, 2, 5, 5), 0.2), 1e-6)  # queries of zero attend uniformly


def test_bfloat16_is_close_to_float32():
  x = images()
  high, low = ViT(**TINY), ViT(**TINY, dtype=jnp.bfloat16)
  variables = init(high, x)
  y = run(low, variables, x)
  assert y.dtype == jnp.bfloat16
  assert_close(y, run(high, variables, x), 0.05)


def test_layer_norm_survives_outlier_channels():
  tokens = images((1, 4, 12))
  tokens[..., 0] += 3e4
  block = Block(2)
  variables = init(block, tokens)
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda a: a.astype('float64'), (variables, tokens))
    expected = jax.jit(block.apply)(*wide)
  y = jax.jit(block.apply)(variables, tokens)
  assert_close(y[..., 1:], expected[..., 1:], 1e-4)


@pytest.mark.parametrize(
  'fields, message',
  [
    (
      {'image_size': 30, 'patch_size': 4},
      '30 x 30 pixels does not divide into patches of patch_size=4',
    ),
    ({'image_size': (8, 9), 'patch_size': 4}, '8 x 9 pixels'),
    ({'num_heads': 5}, 'width=12 is not divisible by num_heads=5'),
    ({'pooling': 'max'}, "pooling='max'"),
    ({'activation': 'relu'}, "activation='relu' is none of"),
    ({'registers': -1}, 'registers=-1 is negative'),
    ({'pooling': 'mean', 'distilled': True}, "distilled: 'token' only"),
    ({'drop_path': 1.0}, 'drop_path=1.0'),
    ({'num_classes': 0}, 'num_classes=0'),
  ],
)
def test_fields_out_of_range_raise_at_construction(fields, message):
  with pytest.raises(ValueError, match=message):
    ViT(**{**TINY, **fields})


def test_bad_images_raise():
  with pytest.raises(ValueError, match='10 x 8 pixels does not divide'):
    jax.eval_shape(ViT(**TINY).init, jax.random.key(0), images((1, 10, 8, 3)))
  with pytest.raises(ValueError, match='batch, height, width, channels'):
    jax.eval_shape(ViT(**TINY).init, jax.random.key(0), images((8, 8, 3)))
