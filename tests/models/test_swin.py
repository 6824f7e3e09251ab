import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_vectors import assert_close
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from models.random_variables import random_images as images
from models.random_variables import random_variables as init
from models.random_variables import run, run_capture
from rule_weights import rule_tensor

from jaxlab.models import abstract_variables, apply, from_torch, module_paths, to_torch
from jaxlab.models.intercept import Hook
from jaxlab.models.swin import (
  Block,
  PatchMerging,
  Swin,
  WindowAttention,
  merge_windows,
  partition_windows,
  relative_position_index,
)

TINY = {
  'patch_size': 2,
  'image_size': 8,
  'window_size': 2,
  'width': 8,
  'depths': (2, 1),
  'num_heads': (2, 4),
  'num_classes': 5,
}
ONE_STAGE = {**TINY, 'depths': (2,)}


# First logits of timm 1.0.31's SwinTransformer (embed_dim 8, patch 2, heads 2, 4, 4) under the rule weights.
@pytest.mark.parametrize(
  'image_size, window_size, depths, expected',
  [
    # Filled windows, an odd feature map, and stages smaller than the window in one direction or both.
    ((28, 20), 5, (2, 2, 2), (0.670509, 0.189797, 1.08506, 1.146202)),
    # Oblong windows.
    ((24, 40), (3, 5), (2, 2), (0.188483, 0.817396, 0.075046, 0.948642)),
    # A last stage that is shifted in one direction alone.
    ((20, 28), 3, (2, 2, 2), (1.381375, 0.47912, 1.568842, 1.181955)),
  ],
)
def test_small_and_uneven_networks_agree_with_timm(image_size, window_size, depths, expected):
  model = Swin(2, image_size, window_size, 8, depths, (2, 4, 4), num_classes=10)
  blank = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract_variables(model))
  state_dict = {name: rule_tensor(name, a.shape) for name, a in to_torch(blank).items()}
  x = np.random.default_rng(3).standard_normal((2, 3, *image_size)).astype(np.float32)
  logits = run(model, from_torch(model, state_dict), x.transpose(0, 2, 3, 1))
  np.testing.assert_allclose(logits[0, :4], expected, atol=2e-5)


@pytest.mark.parametrize('window', [(1, 1), (3, 3), (2, 5)])
def test_relative_position_index_numbers_the_offsets(window):
  index = relative_position_index(window)
  tokens = [(r, c) for r in range(window[0]) for c in range(window[1])]
  rows = {}
  for q, (r, c) in enumerate(tokens):
    for k, (s, d) in enumerate(tokens):
      assert rows.setdefault((r - s, c - d), index[q, k]) == index[q, k]
  # One row of the table for each offset, in the order of rows, then columns.
  assert [rows[offset] for offset in sorted(rows)] == list(range(len(rows)))


def test_windows_are_in_raster_order_and_merge_back():
  x = np.arange(2 * 4 * 6).reshape(2, 4, 6, 1)
  windows = np.asarray(partition_windows(x, (2, 3)))
  assert windows.shape == (8, 6, 1)
  np.testing.assert_array_equal(windows[1, :, 0], [3, 4, 5, 9, 10, 11])
  np.testing.assert_array_equal(windows[2, :, 0], [12, 13, 14, 18, 19, 20])
  np.testing.assert_array_equal(merge_windows(windows, (2, 3), (4, 6)), x)


def attention_over_windows_of_membership(variables, x, window, shift, heads):
  """Attention over the whole map, where two tokens see each other if the moved grid has them in one cell."""
  params = variables['params']['attention']
  rows, columns, width = x.shape
  qkv = x.reshape(-1, width) @ params['qkv']['kernel'] + params['qkv']['bias']
  qkv = qkv.reshape(rows * columns, 3, heads, width // heads)
  position = [(r, c) for r in range(rows) for c in range(columns)]
  cell = [tuple((p[i] - shift[i]) // window[i] for i in (0, 1)) for p in position]
  y = np.zeros((rows * columns, heads, width // heads))
  for q, (r, c) in enumerate(position):
    seen = [k for k in range(len(position)) if cell[k] == cell[q]]
    offsets = [
      (r - position[k][0] + window[0] - 1) * (2 * window[1] - 1)
      + (c - position[k][1] + window[1] - 1)
      for k in seen
    ]
    for head in range(heads):
      scores = qkv[seen, 1, head] @ qkv[q, 0, head] / np.sqrt(width // heads)
      weights = np.exp(scores + params['relative_position_bias_table'][offsets, head])
      y[q, head] = weights @ qkv[seen, 2, head] / weights.sum()
  y = y.reshape(rows * columns, width) @ params['proj']['kernel'] + params['proj']['bias']
  return y.reshape(rows, columns, width)


@pytest.mark.parametrize(
  'grid, window, shift',
  [((4, 4), (2, 2), (0, 0)), ((6, 9), (3, 3), (1, 1)), ((8, 6), (4, 3), (2, 0))],
)
def test_shifted_windows_equal_attention_over_window_membership(grid, window, shift):
  with jax.enable_x64(True):
    x = images((2, *grid, 4)).astype(np.float64)
    block = Block(2, window, shift)
    variables = jax.tree.map(lambda a: a.astype(np.float64), init(block, x))
    variables['params']['mlp']['fc2'] = jax.tree.map(
      np.zeros_like, variables['params']['mlp']['fc2']
    )
    y, captured = jax.jit(
      lambda v, x: apply(
        block,
        v,
        x,
        hooks=[Hook('norm1', output=lambda site, y: site.write('y', y) or y)],
        mutable=['hooks'],
      )
    )(variables, x)
    normalized = np.asarray(captured['hooks']['norm1']['y'])
    for example in range(2):
      expected = attention_over_windows_of_membership(
        variables, normalized[example], window, shift, 2
      )
      assert_close(y[example] - x[example], expected, 1e-9)


def test_filled_windows_attend_to_zeros_behind_the_norm():
  x = images((2, 3, 5, 4))
  block = Block(2, (2, 3))
  variables = init(block, x)
  y, captured = run_capture(block, variables, ['norm1', 'attention', 'attention/softmax'], x)
  padded = np.pad(captured['norm1'], ((0, 0), (0, 1), (0, 1), (0, 0)))
  attention = WindowAttention(2, (2, 3))
  own = {'params': variables['params']['attention']}
  expected = jax.jit(attention.apply)(own, partition_windows(padded, (2, 3)))
  assert_close(captured['attention'], expected, 1e-5)
  assert y.shape == x.shape
  # A window's column behind the edge gets its share of every token's attention.
  assert captured['attention/softmax'][1, :, :, 2].min() > 1e-3


def test_patch_merging_stacks_columns_first_and_fills_odd_sides():
  x = np.zeros((1, 3, 4, 2), np.float32)
  x[0, :2, :2, 0] = [[1, 3], [2, 4]]
  x[0, 2, 2:, 1] = [5, 6]
  merging = PatchMerging(8)
  variables = init(merging, x)
  hook = Hook('norm', input=lambda site, y: site.write('x', y) or y)
  y, state = jax.jit(lambda v, x: apply(merging, v, x, hooks=[hook], mutable=['hooks']))(
    variables, x
  )
  merged = state['hooks']['norm']['x']
  assert y.shape == (1, 2, 2, 8)
  np.testing.assert_array_equal(merged[0, 0, 0], [1, 0, 2, 0, 3, 0, 4, 0])
  np.testing.assert_array_equal(merged[0, 1, 1], [0, 5, 0, 0, 0, 6, 0, 0])
  assert 'bias' not in variables['params']['reduction']


@pytest.mark.parametrize(
  'image_size, window_size, windows',
  [
    (224, 7, [((7, 7), (3, 3))] * 3 + [((7, 7), (0, 0))]),
    (384, 12, [((12, 12), (6, 6))] * 3 + [((12, 12), (0, 0))]),
    ((96, 256), 8, [((8, 8), (4, 4)), ((8, 8), (4, 4)), ((6, 8), (0, 4)), ((3, 8), (0, 0))]),
    (240, 7, [((7, 7), (3, 3))] * 4),
  ],
)
def test_windows_shrink_to_small_feature_maps_and_stay(image_size, window_size, windows):
  model = Swin(image_size=image_size, window_size=window_size)
  assert [model.stage_window(stage) for stage in range(4)] == windows


def test_modules_carry_timms_names_and_hook_points():
  attention = [f'attention/{name}' for name in ('qkv', 'query', 'key', 'value', 'softmax', 'proj')]
  mlp = ['norm2', 'mlp', 'mlp/fc1', 'mlp/gelu', 'mlp/fc2']
  block = ['norm1', 'attention', *attention, 'residual', *mlp]
  merging = ['downsample', 'downsample/norm', 'downsample/reduction']
  assert module_paths(Swin(**{**TINY, 'depths': (1, 1)}), images()) == [
    *('patch_embed', 'patch_embed/proj', 'patch_embed/norm'),
    *('layers_0', 'layers_0/blocks_0', *(f'layers_0/blocks_0/{name}' for name in block)),
    *('layers_1', *(f'layers_1/{name}' for name in merging)),
    *('layers_1/blocks_0', *(f'layers_1/blocks_0/{name}' for name in block)),
    *('norm', 'avgpool', 'head', 'head/fc'),
  ]


def test_features_are_the_mean_normalized_tokens():
  model = Swin(**{**ONE_STAGE, 'num_classes': None})
  y, captured = run_capture(model, init(model, x := images()), ['norm'], x)
  assert_close(y, captured['norm'].mean((1, 2)), 1e-6)
  assert y.shape == (3, 8)


def loss_and_gradient(model, params, x):
  def loss(params, x):
    rngs = {'drop_path': jax.random.key(7)}
    return jnp.sum(jnp.sin(model.apply({'params': params}, x, True, rngs=rngs)))

  return jax.jit(jax.value_and_grad(loss))(params, x)


def assert_trees_close(actual, expected, rtol):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert_close(a, b, rtol, 1e-6)


@pytest.fixture(scope='module')
def plain():
  x = images((8, 8, 8, 3))
  params = init(Swin(**TINY), x)['params']
  return x, params, loss_and_gradient(Swin(**TINY, drop_path=0.5), params, x)


@pytest.mark.exhaustive
def test_remat_on_eight_devices_gives_the_plain_loss_and_gradient_of_one(plain):
  x, params, expected = plain
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ('data', 'fsdp'))
  x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(('data', 'fsdp'))))
  actual = loss_and_gradient(Swin(**TINY, drop_path=0.5, remat=True), params, x)
  assert_trees_close(actual, expected, 1e-4)
  for path, leaf in jax.tree_util.tree_leaves_with_path(actual[1]):
    assert np.isfinite(leaf).all() and np.any(leaf != 0), jax.tree_util.keystr(path)


def test_drop_path_draws_by_key_and_not_in_evaluation():
  x = images()
  model = Swin(**ONE_STAGE, drop_path=0.5)
  variables = init(model, x)
  train = jax.jit(
    lambda seed: model.apply(variables, x, True, rngs={'drop_path': jax.random.key(seed)})
  )
  np.testing.assert_array_equal(train(0), train(0))
  assert float(jnp.abs(train(0) - train(1)).max()) > 1e-3
  jax.eval_shape(model.apply, variables, x)  # no key: nothing is drawn
  block = Block(2, (2, 2), (1, 1))
  tokens = images((2, 4, 4, 8))
  y = jax.jit(block.apply)(init(block, tokens), tokens, jnp.zeros((2, 2)))
  np.testing.assert_array_equal(y, tokens)


@pytest.mark.exhaustive
def test_vmap_over_parameters_equals_a_loop():
  x = images((2, 3, 4, 4))
  block = Block(2, (2, 2), (1, 1))
  own = [init(block, x, seed=seed) for seed in range(2)]
  many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
  outputs = jax.jit(jax.vmap(lambda v: block.apply(v, x)))(many)
  assert_close(outputs[1], jax.jit(block.apply)(own[1], x), 1e-5)


def test_bfloat16_is_close_to_float32():
  x = images()
  high, low = Swin(**ONE_STAGE), Swin(**ONE_STAGE, dtype=jnp.bfloat16)
  variables = init(high, x)
  y = run(low, variables, x)
  assert y.dtype == jnp.bfloat16
  assert_close(y, run(high, variables, x), 0.05)
  shapes = jax.eval_shape(low.init, jax.random.key(0), x)
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'image_size': 9}, '9 x 9 pixels does not divide into patches of patch_size=2'),
    ({'image_size': (8, 9)}, '8 x 9 pixels'),
    ({'image_size': 0}, 'image_size=0 is not positive'),
    ({'depths': (1, 1, 1)}, '3 stages need as many num_heads'),
    ({'num_heads': (2, 3)}, r'num_heads\[1\]=3 does not divide the 16 channels'),
    ({'window_size': 0}, 'window_size=0'),
    ({'drop_path': 1.0}, 'drop_path=1.0'),
    ({'num_classes': 0}, 'num_classes=0'),
  ],
)
def test_fields_out_of_range_raise_at_construction(fields, message):
  with pytest.raises(ValueError, match=message):
    Swin(**{**TINY, **fields})


def test_bad_images_raise():
  with pytest.raises(ValueError, match=r'got \(8, 10\): give image_size=\(8, 10\)'):
    jax.eval_shape(Swin(**TINY).init, jax.random.key(0), images((1, 8, 10, 3)))
  with pytest.raises(ValueError, match='batch, height, width, channels'):
    jax.eval_shape(Swin(**TINY).init, jax.random.key(0), images((8, 8, 3)))


def test_grids_that_windows_and_merging_do_not_divide_agree_with_timm():
  # Outputs of timm 1.0.31's SwinTransformer: grids of 15 x 19 and 8 x 10 tokens, windows of 7.
  expected = np.load(pathlib.Path(__file__).with_name('timm_swin_odd_grids.npz'))
  fields = {'image_size': (60, 76), 'width': 16, 'depths': (2, 2), 'num_heads': (2, 4)}
  model = Swin(num_classes=10, **fields)
  blank = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract_variables(model))
  variables = from_torch(
    model, {name: rule_tensor(name, a.shape) for name, a in to_torch(blank).items()}
  )
  x = np.random.default_rng(0).standard_normal((2, 3, 60, 76)).astype(np.float32)
  logits, captured = run_capture(model, variables, ['norm'], x.transpose(0, 2, 3, 1))
  assert_close(logits, expected['logits'], 1e-5)
  assert_close(captured['norm'][:, ::3, ::3, ::4], expected['features'], 1e-5)
