import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn
from flax import traverse_util
from golden_vectors import assert_close, golden

from jaxlab import compression, models
from jaxlab.models import PVT, VGG, MobileNetV2, ResNet, ViT

FEW = {'num_classes': 3}
NETWORKS = {
  'basic': ResNet((2, 2), width=4, stem='cifar', **FEW),
  'bottleneck': ResNet((2, 2), 'bottleneck', width=4, stem='cifar', **FEW),
  'mobilenetv2': MobileNetV2(
    (1, 2, 2), (4, 6, 8), (1, 1, 2), stem_width=6, head_width=9, stem='cifar', expansion=2, **FEW
  ),
  'vgg': VGG((1, 2), (6, 8), hidden=10, **FEW),
  'vit': ViT(4, 8, 12, 2, num_heads=3, **FEW),
  'pvt': PVT((4, 6), (1, 2), (2, 3), (2, 2), (2, 1), **FEW),
}
MORE = {
  'deep stem': ResNet((2, 1), width=8, stem='deep', shortcut='average', **FEW),
  'padded': ResNet((2, 2), width=4, stem='cifar', shortcut='pad', **FEW),
  'resnext': ResNet((1, 2), 'bottleneck', width=8, stem='cifar', cardinality=2, **FEW),
  'vgg_bn': VGG((1, 2), (6, 8), batch_norm=True, hidden=None, **FEW),
  'deit': ViT(
    4, 8, 12, 2, num_heads=3, distilled=True, layer_scale=0.1, registers=2, pre_norm=True,
    activation='swiglu', **FEW,
  ),
}  # fmt: skip


def drawn(model: nn.Module, seed: int = 0):
  """Returns inputs and variables of a network, all of them random."""
  rng = np.random.default_rng(seed)
  side = 8 if isinstance(model, ViT) else 16
  x = jnp.asarray(rng.normal(size=(3, side, side, 3)), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)

  def draw(path, leaf):
    values = rng.normal(0, 0.4, leaf.shape)
    return jnp.asarray(np.abs(values) + 0.5 if path[-1].key == 'var' else values, jnp.float32)

  return x, jax.tree_util.tree_map_with_path(draw, shapes)


def some_plan(model: nn.Module, drop=()) -> compression.Plan:
  """Returns a plan that takes channels from every group, as many from each head."""
  rng, keep = np.random.default_rng(1), {}
  for name, group in compression.structure(model).groups.items():
    width = group.size // group.heads
    keep[name] = [
      head * width + channel
      for head in range(group.heads)
      for channel in rng.permutation(width)[: max(1, width * 2 // 3)]
    ]
  return compression.plan(model, keep, drop)


def masked(model: nn.Module, variables, plan: compression.Plan, x):
  masks = compression.masks(model, plan)
  return jax.jit(lambda: compression.masked_apply(model, variables, masks, x))()


def shapes_of(tree):
  return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(dict(tree)).items()}


@pytest.mark.parametrize('name', tables.few(NETWORKS, 'mobilenetv2', 'pvt'))
def test_sliced_network_computes_what_the_masked_one_does(name):
  model = NETWORKS[name]
  x, variables = drawn(model)
  parts = compression.structure(model).parts[-1:]
  plan = some_plan(model, parts)
  small, own = compression.slice_network(model, variables, plan)
  shapes = jax.eval_shape(small.init, jax.random.key(0), x)
  assert shapes_of(own) == shapes_of(shapes)
  assert_close(jax.jit(small.apply)(own, x), masked(model, variables, plan, x), 1e-5)
  models.anatomy(small).check(small, x)
  # What is left can be cut again.
  assert compression.structure(small).sizes == {
    new: plan.kept_sizes[old]
    for old in plan.sizes
    if (new := compression.renamed(old, plan.drop)) is not None
  }


@pytest.mark.parametrize('name', tables.few(MORE, 'deit'))
def test_sliced_variant_computes_what_the_masked_one_does(name):
  model = MORE[name]
  x, variables = drawn(model)
  plan = some_plan(model)
  small, own = compression.slice_network(model, variables, plan)
  assert shapes_of(own) == shapes_of(jax.eval_shape(small.init, jax.random.key(0), x))
  assert_close(jax.jit(small.apply)(own, x), masked(model, variables, plan, x), 1e-5)


def test_a_projection_stays_where_channels_become_as_many():
  # 4 channels before a stage of stride 1 and behind it, once it is cut: the shape no longer tells.
  model = ResNet((1, 1), 'bottleneck', width=4, strides=(1, 1), stem='cifar', **FEW)
  small, own = compression.slice_network(
    model, drawn(model)[1], compression.plan(model, {'layer1': range(4), 'layer2': range(4)})
  )
  assert small.projections == (True, True) and 'downsample_0' in own['params']['layer2_0']
  model = NETWORKS['mobilenetv2']
  small, _ = compression.slice_network(
    model, drawn(model)[1], compression.plan(model, {'blocks_1': range(4)})
  )
  assert [block.shortcut for block in models.anatomy(small).blocks][1] == 'none'


def test_whole_heads_go_and_others_keep_their_width():
  model = NETWORKS['vit']
  x, variables = drawn(model)
  plan = compression.plan(model, {'blocks_1/attention/qkv': [*range(4), *range(8, 12)]})
  small, own = compression.slice_network(model, variables, plan)
  assert small.attention_heads == (3, 2) and small.attention_widths == (12, 8)
  assert_close(jax.jit(small.apply)(own, x), masked(model, variables, plan, x), 1e-5)


def test_plans_are_saved_whole_and_compose(tmp_path):
  model = NETWORKS['basic']
  _, variables = drawn(model)
  first = some_plan(model, ['layer1_1'])
  first.save(tmp_path / 'plan.json')
  assert compression.Plan.load(tmp_path / 'plan.json') == first
  small, own = compression.slice_network(model, variables, first)
  second = compression.plan(small, {'layer1': [1], 'layer2_1/conv1': [0, 2]})
  both = compression.compose(model, first, second)
  expected = compression.slice_network(small, own, second)
  found = compression.slice_network(model, variables, both)
  assert found[0] == expected[0]
  jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])
  broken = {
    'indices from -1 to 99': {'layer1': (-1, 99)},
    'nothing would stay': {'layer1': ()},
    'indices come twice': {'layer1': (1, 1)},
  }
  for message, keep in broken.items():
    with pytest.raises(ValueError, match=f'the plan would break this ResNet: layer1: {message}'):
      compression.slice_network(model, variables, compression.Plan(first.sizes, keep))
  (tmp_path / 'plan.json').write_text('{"format": 1, "sizes": {}, "keep": {"layer1": [0.5]}}')
  with pytest.raises(ValueError, match='holds no plan'):
    compression.Plan.load(tmp_path / 'plan.json')
  (tmp_path / 'plan.json').write_text('{"format": 1, "kept": 3}')
  with pytest.raises(ValueError, match=r'plan\.json holds no plan'):
    compression.Plan.load(tmp_path / 'plan.json')
  with pytest.raises(ValueError, match='not made for the network that the first one makes'):
    compression.compose(model, first, first)


def test_masks_of_a_vit_serve_grad_and_vmap():
  model = NETWORKS['vit']
  x, variables = drawn(model)

  def loss(mask):
    logits = compression.masked_apply(model, variables, {'blocks_0/mlp/fc1': mask}, x)
    return jnp.sum(logits**2)

  ones = jnp.ones(compression.structure(model).sizes['blocks_0/mlp/fc1'])
  gradient = jax.jit(jax.grad(loss))(ones)
  assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
  stacked = jax.jit(jax.vmap(loss))(jnp.stack([ones, ones.at[0].set(0)]))
  assert_close(stacked[0], jnp.sum(jax.jit(model.apply)(variables, x) ** 2), 1e-5)
  assert stacked[0] != stacked[1]


def stage_variables(arrays):
  """Returns variables of a ResNet, in float64, from the arrays of one stage and a classifier."""
  kinds = {'weight': 'scale', 'bias': 'bias', 'running_mean': 'mean', 'running_var': 'var'}
  found = {}
  for name, value in arrays.items():
    module, kind = re.fullmatch(r'(.*?)_(weight|bias|running_mean|running_var)', name).groups()
    block = re.fullmatch(r'layer1_block_(\d+)_(\w+)', module)
    path = f'layer1_{int(block[1]) - 1}/{block[2]}' if block else module
    path = path.replace('layer1_downsample', 'layer1_0/downsample')
    leaf, new = value, kinds[kind]
    if value.ndim > 1:
      leaf, new = np.moveaxis(value, (0, 1), (-1, -2)), 'kernel'
    collection = 'batch_stats' if 'running' in kind else 'params'
    found[f'{collection}/{path}/{new}'] = jnp.asarray(leaf, jnp.float64)
  return traverse_util.unflatten_dict(found, sep='/')


@golden('curl', 'kl_scores')
def test_scores_agree_with_official_code(vectors):
  arrays = vectors.tree('param_')
  blocks = sorted({int(match[1]) for name in arrays if (match := re.search(r'block_(\d+)', name))})
  width, (classes, trunk) = vectors['in_feature_nchw'].shape[1], arrays['fc_weight'].shape
  inner = [
    tuple(len(arrays[f'layer1_block_{block}_conv{i}_weight']) for i in (1, 2)) for block in blocks
  ]
  model = ResNet(
    (len(blocks),), 'bottleneck', width=width, strides=(2,), trunk_widths=(trunk,),
    inner_widths=inner, stem='identity', num_classes=classes,
  )  # fmt: skip
  with jax.enable_x64():
    variables = stage_variables(arrays)
    x = jnp.asarray(vectors['in_feature_nchw'].transpose(0, 2, 3, 1))
    assert_close(jax.jit(model.apply)(variables, x), vectors['out_logits'], 1e-7)
    sums = jax.jit(lambda x: compression.removal_scores(model, variables, x))(x)
    scores = {name: own / len(x) for name, own in sums.items()}
  assert_close(scores['layer1'], vectors['out_score_stage_0'], 1e-6, 1e-9)
  for block in range(len(blocks)):
    for number in (1, 2):
      expected = vectors[f'out_score_stage_0_block_{block}_mask{number}']
      assert_close(scores[f'layer1_{block}/conv{number}'], expected, 1e-6, 1e-9)


def test_all_candidates_are_scored_by_one_compiled_function_at_the_cost_of_their_passes():
  model = NETWORKS['basic']
  x, variables = drawn(model)
  passes = jax.jit(model.apply).lower(variables, x).compile().cost_analysis()['flops']
  traced = []

  def score(pruned, original):
    traced.append(pruned.shape)
    return compression.prediction_divergence(pruned, original)

  scored = jax.jit(lambda x: compression.removal_scores(model, variables, x, score=score))
  found = scored(x)
  assert traced == [(3, 3)]
  # XLA counts a loop's body once: that is one candidate next to the pass of the whole network.
  flops = scored.lower(x).compile().cost_analysis()['flops']
  assert flops < 2 * 2 * passes
  structure = compression.structure(model)
  assert {name: own.shape for name, own in found.items()} == {
    **{name: (size,) for name, size in structure.sizes.items()},
    **dict.fromkeys(structure.parts, ()),
  }
  plan = compression.plan(model, {'layer2_0/conv1': np.arange(8) != 3})
  whole = jax.jit(model.apply)(variables, x)
  expected = compression.prediction_divergence(masked(model, variables, plan, x), whole).sum()
  assert_close(found['layer2_0/conv1'][3], expected, 1e-3, 1e-7)


def test_norms_of_kernels_are_sums_over_what_makes_a_channel():
  model = NETWORKS['basic']
  _, variables = drawn(model)
  found = compression.kernel_norms(model, variables, ['layer2_0/conv1', 'layer2'])
  params = variables['params']
  kernel = np.asarray(params['layer2_0']['conv1']['kernel'])
  assert_close(found['layer2_0/conv1'], np.abs(kernel).sum((0, 1, 2)))
  writers = [('layer2_0', 'conv2'), ('layer2_0', 'downsample_0'), ('layer2_1', 'conv2')]
  total = sum(np.abs(params[a][b]['kernel']).sum((0, 1, 2)) for a, b in writers)
  assert_close(found['layer2'], total)
  with pytest.raises(ValueError, match="'layer2' is no layer"):
    compression.kernel_norms(model, variables, ['layer2'], named_layer=True)


@pytest.mark.parametrize(
  ('keep', 'drop', 'message'),
  [
    ({'layer2_0/conv1': []}, (), 'layer2_0/conv1: nothing would stay'),
    ({'layer2_0/conv1': [8]}, (), 'indices from 8 to 8 of 8 channels'),
    ({'layer2_0/conv1': [1, 1]}, (), 'indices come twice'),
    ({'layer2_0/conv1': [0.5]}, (), 'expected indices, or a mask of 8'),
    ({'layer2_1/conv2': [0]}, (), "'layer2_1/conv2' is no group"),
    ({}, ['layer2_0'], "'layer2_0' cannot be left out; parts that can are layer1_0, layer1_1"),
    ({}, ['layer1_0', 'layer1_1'], 'no block would be left of the stage of layer1_0'),
  ],
)
def test_plans_that_would_break_a_network_are_refused(keep, drop, message):
  with pytest.raises(ValueError, match=message):
    compression.plan(NETWORKS['basic'], keep, drop)


def test_heads_of_different_widths_are_refused():
  with pytest.raises(ValueError, match=r'heads would have different widths, \[4, 1\]'):
    compression.plan(NETWORKS['vit'], {'blocks_0/attention/qkv': range(5)})
  with pytest.raises(ValueError, match='12 channels do not divide into 5 heads'):
    compression.plan(
      NETWORKS['vit'], {'blocks_0/attention/qkv': range(5)}, heads={'blocks_0/attention/qkv': 5}
    )


def test_heads_of_a_stage_stay_as_many():
  with pytest.raises(ValueError, match='as many heads in all blocks of a stage'):
    compression.plan(NETWORKS['pvt'], {'stages_1/blocks_0/attention/q': range(4)})


def test_the_order_of_a_plans_groups_does_not_matter():
  model = NETWORKS['vgg']
  plan = some_plan(model)
  turned = compression.Plan(dict(reversed(plan.sizes.items())), plan.keep)
  assert compression.sliced_model(model, turned) == compression.sliced_model(model, plan)


def test_plans_and_variables_of_other_networks_are_refused():
  model = NETWORKS['basic']
  plan = some_plan(model)
  other = model.clone(width=8)
  with pytest.raises(ValueError, match=r'made for another network .*layer1: 4 here, 8 there'):
    compression.masks(other, plan)
  with pytest.raises(ValueError, match='the variables are not those of this network'):
    compression.slice_network(model, drawn(other)[1], plan)
  with pytest.raises(
    ValueError, match=r'What can be cut out of MLP is not known \(known are ResNet'
  ):
    compression.structure(models.MLP())
  with pytest.raises(ValueError, match=r"masks\['layer1'\] has shape \(3,\), expected \(4,\)"):
    compression.masked_apply(model, {}, {'layer1': jnp.ones(3)}, None)


def test_multiply_accumulates_follow_from_shapes():
  model = NETWORKS['vit']
  x, variables = drawn(model)
  tokens, width, hidden = 5, 12, 48
  block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden
  expected = 2 * block + 4 * (4 * 4 * 3) * width + width * 3
  assert compression.multiply_accumulates(model, variables, x[:1]) == expected
  assert compression.multiply_accumulates(model, None, x[:1]) == expected
  assert compression.num_parameters(variables) == sum(map(np.size, jax.tree.leaves(variables)))
  with pytest.raises(ValueError, match="expected the collection 'params'"):
    compression.num_parameters(variables['params'])


def test_latency_takes_sides_in_turns():
  order = []
  sides = {name: lambda name=name: order.append(name) or jnp.zeros(()) for name in 'ab'}
  found = compression.paired_latency(sides, 2, warmups=1)
  assert order == ['a', 'b'] * 3 and set(found) == {'a', 'b'} and min(found.values()) >= 0
  with pytest.raises(ValueError, match='at least one repeat'):
    compression.paired_latency(sides, 0)


def test_what_modules_hand_on_is_seen_without_what_masks_take_out():
  model = NETWORKS['basic']
  x, variables = drawn(model)

  @jax.jit
  def outputs(stays):
    given, hooks = compression.masked(model, variables, {'layer2_1': stays})
    return models.capture(model, given, ['layer2_0', 'layer2_1'], x, hooks=hooks)

  (out, whole), (left, cut) = outputs(1.0), outputs(0.0)
  np.testing.assert_array_equal(cut['layer2_1'], cut['layer2_0'])
  np.testing.assert_array_equal(whole['layer2_0'], cut['layer2_0'])
  assert np.abs(whole['layer2_1'] - cut['layer2_1']).max() > 0.1 < np.abs(out - left).max()
