import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from flax import linen as nn
from flax import nnx, traverse_util
from golden_vectors import assert_close
from models.random_variables import random_images, random_variables

from jaxlab import models
from jaxlab.models import (
  CNN13,
  GPT2,
  MLP,
  VGG,
  Anatomy,
  Bert,
  BilinearCNN,
  Block,
  Bloom,
  Branch,
  Classifier,
  ConvNet,
  ConvNeXt,
  DenseNet,
  DINOHead,
  EfficientNet,
  Encoder,
  Hook,
  LearnableWeightScaling,
  Llama,
  MLPHead,
  MobileNetV2,
  Norm,
  ResNet,
  ShakeShake,
  Swin,
  ViT,
  WideResNet,
  anatomy,
  any_of,
  apply,
  capture,
  map_matching,
  module_paths,
)
from jaxlab.quantizers import ptq, uniform_rules
from jaxlab.quantizers.compensation import compensate

IMAGES = random_images((2, 16, 16, 3))
TOKENS = np.random.default_rng(0).integers(0, 11, (2, 8)).astype(np.int32)
VECTORS = random_images((2, 6))
DECODER = {'width': 8, 'depth': 2, 'num_heads': 2, 'vocab_size': 11, 'max_length': 8}
VIT = {'patch_size': 8, 'image_size': 16, 'width': 8, 'depth': 2, 'num_heads': 2, 'num_classes': 3}
SWIN = {'patch_size': 2, 'image_size': 16, 'width': 8, 'depths': (2, 1), 'num_heads': (2, 2)}
RESNET = {'stage_sizes': (1, 2), 'width': 4, 'num_classes': 3}
SMALL = ResNet((1,), width=4, stem='cifar')
NETWORKS = {
  'resnet': (ResNet(**RESNET), IMAGES),
  'bottlenecks': (ResNet(**RESNET, block='bottleneck'), IMAGES),
  'resnet_d': (ResNet(**RESNET, stem='deep', shortcut='average'), IMAGES),
  'cifar': (ResNet((2, 1), width=4, stem='cifar', shortcut='pad', num_classes=3), IMAGES),
  'no_stem': (ResNet((2, 1), width=4, stem='identity', num_classes=3), IMAGES),
  'wide': (WideResNet((1, 2), (4, 8), (1, 2), 4, num_classes=3), IMAGES),
  'bare wide': (WideResNet((1,), (4,), (1,), 4, final_norm=False, num_classes=3), IMAGES),
  'mobilenet': (
    MobileNetV2((1, 2, 1), (8, 8, 8), (1, 2, 1), 2, 8, 8, num_classes=3),
    IMAGES,
  ),
  'efficientnet': (
    EfficientNet(
      (1, 2), (8, 8), (1, 2), expansion=2, stem_width=8, head_width=8, padding='SAME', num_classes=3
    ),
    IMAGES,
  ),
  'vit': (ViT(**VIT), IMAGES),
  'vit_mean': (ViT(**VIT, pooling='mean', remat=True), IMAGES),
  'deit3': (ViT(**VIT, layer_scale=0.5, embed_prefix=False), IMAGES),
  'dinov2': (ViT(**VIT, layer_scale=0.5, registers=2, activation='swiglu'), IMAGES),
  'clip': (ViT(**VIT, pre_norm=True, activation='quick_gelu'), IMAGES),
  'deit': (ViT(**VIT, distilled=True), IMAGES),
  'scanned': (ViT(**VIT, scan=True), IMAGES),
  'swin': (Swin(**SWIN, window_size=4, num_classes=3), IMAGES),
  'swin_filled': (Swin(**SWIN, window_size=3, num_classes=3), IMAGES),
  'convnext': (ConvNeXt((1, 2), (4, 8), layer_scale=0.5, num_classes=3), IMAGES),
  'densenet': (DenseNet((2, 1), 4, 6, num_classes=3), IMAGES),
  'vgg': (VGG((2, 1), (4, 6), hidden=8, num_classes=3), IMAGES),
  'vgg_bn': (VGG((1, 2), (4, 6), True, 8, num_classes=3), IMAGES),
  'bilinear': (BilinearCNN((2, 1), (4, 6), num_classes=3), IMAGES),
  'vgg_pooled': (VGG((1, 1), (4, 6), True, None, num_classes=3), IMAGES),
  'bert': (Bert(**DECODER, num_classes=3), TOKENS),
  'gpt2': (GPT2(**DECODER), TOKENS),
  'gpt2_untied': (GPT2(**DECODER, tied=False), TOKENS),
  'bloom': (Bloom(**DECODER), TOKENS),
  'llama': (Llama(**DECODER, hidden=12), TOKENS),
  'llama_tied': (Llama(**DECODER, hidden=12, tied=True), TOKENS),
  'convnet': (ConvNet((4, 5), 2, (2, 1), (6,), 3), IMAGES),
  'cnn13': (CNN13((4, 4, 5, 4, 4), num_classes=3), IMAGES),
  'shake_shake': (ShakeShake((2, 1), (4, 6), 3, num_classes=3), IMAGES),
  'mlp': (MLP((4, 5, 6), 3), VECTORS),
  'linear': (MLP((), 3), VECTORS),
  'features': (ResNet((1,), width=4, stem='cifar'), IMAGES),
  'encoder': (Encoder(SMALL, MLPHead((5, 5, 3), last_norm='affine')), IMAGES),
  'dino': (Encoder(SMALL, DINOHead(7, 6, 5)), IMAGES),
  'classifier': (Classifier(SMALL, LearnableWeightScaling(3)), IMAGES),
  'dense_head': (Classifier(MLP((4,)), nn.Dense(3)), VECTORS),
}  # fmt: skip
# Others are put together from parts of these.
FAMILIES = (
  'bottlenecks', 'wide', 'mobilenet', 'vit_mean', 'dinov2', 'scanned', 'swin_filled', 'convnext', 'densenet',
  'vgg_bn', 'llama_tied', 'shake_shake', 'encoder', 'classifier',
)  # fmt: skip
every = pytest.mark.parametrize('name', tables.few(NETWORKS, *FAMILIES))


def owners(tree, name):
  """Paths of the modules that own a variable `name`."""
  flat = traverse_util.flatten_dict(tree, sep='/')
  return {path.rpartition('/')[0] for path in flat if path.split('/')[-1] == name}


@every
def test_all_paths_are_those_of_the_network_and_none_is_left_out(name):
  model, x = NETWORKS[name]
  parts = anatomy(model)
  parts.check(model, x)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  params = variables['params']
  assert set(parts.layers) == owners(params, 'kernel')
  assert len(parts.layers) == len(set(parts.layers))
  assert set(parts.embeddings) == owners(params, 'embedding')
  norms = {norm.path for norm in parts.norms}
  heads = set(parts.head)  # LearnableWeightScaling has a `scale`, too
  normalizations = owners(params, 'scale') | owners(variables.get('batch_stats', {}), 'mean')
  assert norms == normalizations - heads
  order = module_paths(model, x)
  for own in (parts.block_paths, parts.stem, parts.neck, [norm.path for norm in parts.norms]):
    assert [order.index(path) for path in own] == sorted(order.index(path) for path in own)
  for block in parts.blocks:
    inside = [path for path in order if path.startswith(f'{block.path}/')]
    kernels = [path for path in inside if path in owners(params, 'kernel')]
    assert sorted(block.layers) == sorted(kernels)
    for branch in block.branches:
      assert list(branch.layers) == [path for path in order if path in branch.layers]


@every
def test_a_block_keeps_the_shape_where_its_shortcut_is_the_identity(name):
  model, x = NETWORKS[name]
  parts = anatomy(model)
  shapes = {}

  def visit(site, call, x, *args, **kwargs):
    y = call(x, *args, **kwargs)
    shapes[site.path] = (x.shape, y.shape)
    return y

  if not parts.blocks:
    assert isinstance(getattr(model, 'backbone', model), MLP | ConvNet | CNN13)
    return
  hooks = [Hook(any_of(parts.block_paths), call=visit)]
  init = lambda x: model.init(jax.random.key(0), x)  # noqa: E731
  jax.eval_shape(lambda x: apply(model, init(x), x, hooks=hooks), x)
  assert list(shapes) == list(parts.block_paths)
  for block in parts.blocks:
    before, after = shapes[block.path]
    same = block.shortcut in ('identity', 'normalized')
    assert same == (before == after) or (block.shortcut == 'none' and isinstance(model, VGG))
    assert not (block.shortcut_layers and block.shortcut != 'projection')


@every
def test_without_its_branches_a_block_is_its_shortcut(name):
  model, x = NETWORKS[name]
  blocks = [block for block in anatomy(model).blocks if block.shortcut == 'identity']
  if not blocks:
    return
  outputs = [branch.output for block in blocks for branch in block.branches]
  variables = random_variables(model, x)

  def record(site, call, x, *args, **kwargs):
    y = call(x, *args, **kwargs)
    site.write('difference', jnp.max(jnp.abs(x - y)))
    return y

  def differences(variables, hooks):
    record_hook = Hook(any_of(block.path for block in blocks), call=record, collection='seen')
    _, state = apply(model, variables, x, hooks=[*hooks, record_hook], mutable=['seen'])
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(state['seen'])])

  off = Hook(any_of(outputs), output=lambda site, y: jnp.zeros_like(y))
  dropped, kept = jax.jit(lambda v: (differences(v, [off]), differences(v, [])))(variables)
  np.testing.assert_array_equal(dropped, 0)
  assert np.all(kept > 1e-3)


@every
def test_the_head_reads_the_features(name):
  model, x = NETWORKS[name]
  parts = anatomy(model)
  if name in ('encoder', 'dino'):
    assert parts.features == 'backbone'
    assert parts.head == tuple(f'projector/{"mlp/" * (name == "dino")}fc{i}' for i in range(3))
    return
  variables = random_variables(model, x)
  patterns = [] if parts.features is None else [parts.features]
  y, captured = jax.jit(lambda v: capture(model, v, patterns, x))(variables)
  features = captured[parts.features] if patterns else x
  flat = traverse_util.flatten_dict(variables['params'], sep='/')
  if parts.tied:
    logits = features @ flat[f'{parts.tied}/embedding'].T
  elif not parts.head:
    logits = features
  else:
    features = features if isinstance(features, tuple) else (features,) * len(parts.head)
    logits = [
      (f @ flat[f'{head}/kernel'] + flat.get(f'{head}/bias', 0)) * flat.get(f'{head}/scale', 1)
      for f, head in zip(features, parts.head, strict=True)
    ]
    logits = sum(logits) / len(logits)
  assert_close(y, logits, 1e-4, 1e-5)


@every
def test_readers_can_absorb_what_their_norm_does_to_channels(name):
  """A scale and a shift of each channel behind a norm, undone in its readers, change nothing."""
  model, x = NETWORKS[name]
  norms = [norm for norm in anatomy(model).norms if norm.readers]
  if not norms:
    return
  variables = random_variables(model, x)
  params = traverse_util.flatten_dict(variables['params'], sep='/')
  rng = np.random.default_rng(1)
  moved = 0
  for norm in norms:
    scale, bias = f'{norm.path}/scale', f'{norm.path}/bias'
    ratio = rng.uniform(0.5, 2, params[scale].shape).astype(np.float32)
    biased = bias in params and all(f'{reader}/bias' in params for reader in norm.readers)
    shift = ratio - 1 if biased else np.zeros_like(ratio)
    params[scale] = params[scale] * ratio
    if bias in params:
      params[bias] = params[bias] * ratio + shift
    for reader in norm.readers:
      kernel = params[f'{reader}/kernel'] / ratio[..., None]
      params[f'{reader}/kernel'] = kernel
      if biased:
        sums = kernel.sum((0, 1)) if kernel.ndim == 4 else kernel  # over a convolution's window
        offset = np.einsum('...i,...io->...o', shift, sums)
        params[f'{reader}/bias'] = params[f'{reader}/bias'] - offset
    moved += biased
  assert moved or name.startswith('llama')
  new = {**variables, 'params': traverse_util.unflatten_dict(params, sep='/')}
  run = jax.jit(model.apply)
  expected = run(variables, x)
  assert_close(run(new, x), expected, 1e-3, 1e-4 * float(jnp.max(jnp.abs(expected))))


def test_windows_filled_with_zeros_are_no_readers_of_a_norm_alone():
  readers = {norm.path: norm.readers for norm in anatomy(NETWORKS['swin_filled'][0]).norms}
  assert readers['layers_0/blocks_1/norm1'] == readers['layers_1/blocks_0/norm1'] == ()
  assert readers['layers_0/blocks_1/norm2'] == ('layers_0/blocks_1/mlp/fc1',)
  readers = {norm.path: norm.readers for norm in anatomy(NETWORKS['swin'][0]).norms}
  assert readers['layers_0/blocks_1/norm1'] == ('layers_0/blocks_1/attention/qkv',)


@every
def test_a_norm_normalizes_the_output_of_its_layer(name):
  model, x = NETWORKS[name]
  parts = anatomy(model)
  behind = {norm.path: norm.layer for norm in parts.norms if norm.layer}
  if not behind:
    return
  returned, given = {}, {}

  def visit(site, call, *args, **kwargs):
    given[site.path] = args[0] if args else None
    returned[site.path] = call(*args, **kwargs)
    return returned[site.path]

  hooks = [Hook('.*', call=visit)]
  jax.eval_shape(lambda x: apply(model, model.init(jax.random.key(0), x), x, hooks=hooks), x)
  for norm, layer in behind.items():
    assert given[norm] is returned[layer]


@pytest.mark.parametrize(
  ('name', 'edges', 'blocks'),
  [
    ('resnet', ('conv1', 'fc'), ('layer1_0', 'layer2_0', 'layer2_1')),
    ('wide', ('conv1', 'linear'), ('block1/layer_0', 'block2/layer_0', 'block2/layer_1')),
    (
      'mobilenet', ('conv_stem', 'classifier'),
      ('blocks_0_0', 'blocks_1_0', 'blocks_1_1', 'blocks_2_0'),
    ),
    ('deit', ('patch_embed/proj', 'head', 'head_dist'), ('blocks_0', 'blocks_1')),
    (
      'swin', ('patch_embed/proj', 'head/fc'),
      ('layers_0/blocks_0', 'layers_0/blocks_1', 'layers_1/blocks_0'),
    ),
    ('gpt2', (), ('h_0', 'h_1')),
    ('llama', ('lm_head',), ('layers_0', 'layers_1')),
    ('mlp', ('fc0', 'fc'), ()),
    ('encoder', ('backbone/conv1', *(f'projector/fc{i}' for i in range(3))), ('backbone/layer1_0',)),
    ('classifier', ('backbone/conv1', 'head'), ('backbone/layer1_0',)),
  ],
)  # fmt: skip
def test_edges_and_blocks_are_named(name, edges, blocks):
  parts = anatomy(NETWORKS[name][0])
  assert parts.edges == edges
  assert parts.block_paths == blocks


def test_shortcuts_branches_and_what_lies_between_blocks_are_named():
  first, second, third = anatomy(NETWORKS['bottlenecks'][0]).blocks
  assert [block.shortcut for block in (first, second, third)] == [
    'projection', 'projection', 'identity',
  ]  # fmt: skip
  assert first.shortcut_layers == ('layer1_0/downsample_0',) and not third.shortcut_layers
  assert second.branches == (
    Branch('conv', tuple(f'layer2_0/conv{i}' for i in (1, 2, 3)), 'layer2_0/bn3'),
  )
  assert anatomy(NETWORKS['cifar'][0]).blocks[2] == Block(
    'layer2_0',
    (Branch('conv', ('layer2_0/conv1', 'layer2_0/conv2'), 'layer2_0/bn2'),),
    'projection',
  )
  mobile = anatomy(NETWORKS['mobilenet'][0])
  assert [block.shortcut for block in mobile.blocks] == ['identity', 'none', 'identity', 'identity']
  assert mobile.neck == ('conv_head',)
  swin = anatomy(NETWORKS['swin'][0])
  assert [block.path for block in swin.transitions] == ['layers_1/downsample']
  assert swin.transitions[0].layers == ('layers_1/downsample/reduction',)
  llama = anatomy(NETWORKS['llama'][0])
  assert [branch.kind for branch in llama.blocks[0].branches] == ['attention', 'mlp']
  assert llama.blocks[0].branches[1] == Branch(
    'mlp', tuple(f'layers_0/mlp/{n}_proj' for n in ('gate', 'up', 'down')), 'layers_0/mlp'
  )
  assert llama.norms[0] == Norm(
    'layers_0/input_layernorm', None, tuple(f'layers_0/self_attn/{n}_proj' for n in 'qkv')
  )
  scanned = anatomy(NETWORKS['scanned'][0])
  assert [(block.path, block.stacked) for block in scanned.blocks] == [('blocks', 2)]
  assert anatomy(NETWORKS['gpt2'][0]).tied == 'wte'
  assert anatomy(NETWORKS['llama'][0]).tied is None


def test_every_named_network_has_an_anatomy():
  for name in (*models.architectures.names(), *models.configurations.SIZES):
    model = models.create(name)
    parts = anatomy(model)
    assert parts.head or parts.tied or model.num_classes is None
    assert parts.blocks or name in ('convnet', 'cnn13', 'mlp', 'linear')


class Own(nn.Module):
  """A network that the library does not know."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4, name='embed')(x)
    for i in range(2):
      x = x + nn.Dense(4, name=f'part{i}')(x)
    return nn.Dense(2, name='out')(nn.LayerNorm(name='norm')(x))


OWN = Anatomy(['embed'], ['part0', Block('part1')], 'norm', ['out'], norms=['norm'])


def test_an_own_network_is_described_by_paths_and_checked():
  assert OWN.blocks == (Block('part0'), Block('part1')) and OWN.norms == (Norm('norm'),)
  assert OWN.edges == ('embed', 'out') and hash(OWN) == hash(dataclasses.replace(OWN))
  OWN.check(Own(), VECTORS)
  OWN.check(Own(), jax.ShapeDtypeStruct((1, 6), jnp.float32))
  branch = Branch('conv', ('part2',), 'part0')
  for wrong in (
    dataclasses.replace(OWN, head=['part2']),
    dataclasses.replace(OWN, blocks=[Block('part0', [branch])]),
    dataclasses.replace(OWN, norms=[Norm('norm', readers=('part2',))]),
  ):
    with pytest.raises(
      ValueError, match=r"names 'part2', which Own does not call; closest .*: part"
    ):
      wrong.check(Own(), VECTORS)


def test_an_anatomy_moves_below_a_prefix_and_back_into_the_larger_network():
  model, x = NETWORKS['swin']
  wrapped = Classifier(model.clone(num_classes=None), nn.Dense(3))
  moved = anatomy(model.clone(num_classes=None)).below('backbone')
  moved.check(wrapped, x)
  assert moved.blocks[1].branches[0].kind == 'attention'
  assert moved.features == 'backbone/avgpool'
  own = dataclasses.replace(moved, features='backbone', head=('head',))
  assert own == anatomy(wrapped)
  assert Anatomy().below('backbone').features == 'backbone'
  stacked = anatomy(NETWORKS['scanned'][0]).below('a/b')
  assert (stacked.blocks[0].path, stacked.blocks[0].stacked) == ('a/b/blocks', 2)


def test_a_backbone_that_keeps_its_classifier_keeps_its_features():
  model = Encoder(ResNet((1,), width=4, stem='cifar', num_classes=5), MLPHead((3,)))
  parts = anatomy(model)
  assert (parts.features, parts.head) == ('backbone/avgpool', ('backbone/fc', 'projector/fc0'))


class OddBlock(nn.Module):
  expansion = 1


@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lambda: anatomy(Own()), r'parts of Own are not known .*ResNet.*Anatomy\(stem='),
    (lambda: anatomy(Encoder(Own(), MLPHead((3,)))), 'parts of Own are not known'),
    (lambda: anatomy(ResNet((1,), block=OddBlock)), r'ResNet with block=.*OddBlock.* are not known'),
    (lambda: anatomy(ResNet), r'model is the class ResNet: pass an instance'),
    (lambda: anatomy('resnet18'), 'model must be a Linen module, got str'),
    (lambda: Anatomy(stem='conv1'), "stem is a sequence of paths; got 'conv1'"),
    (lambda: Anatomy(blocks=3), 'blocks is a sequence of paths; got 3'),
    (lambda: Anatomy(blocks=[Norm('a')]), 'blocks holds paths or Block; got Norm'),
    (lambda: Block('a', ['mlp']), "Block: branches holds Branch; got 'mlp'"),
    (lambda: Branch('mlp', 'fc1', 'fc1'), "Branch: layers is a sequence of paths; got 'fc1'"),
    (lambda: Norm('a', readers='fc1'), "Norm: readers is a sequence of paths; got 'fc1'"),
    (lambda: Anatomy(head=[1]), 'head holds paths; got 1'),
  ],
)  # fmt: skip
def test_what_is_not_known_raises(make, match):
  with pytest.raises(ValueError, match=match):
    make()


class NNXBlock(nnx.Module):
  def __init__(self, width, *, rngs):
    self.fc1 = nnx.Linear(width, 2 * width, rngs=rngs)
    self.fc2 = nnx.Linear(2 * width, width, rngs=rngs)

  def __call__(self, x):
    return x + self.fc2(nnx.relu(self.fc1(x)))


class Shell(nn.Module):
  """A Linen network whose blocks are NNX modules."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4, name='embed')(x)
    for i in range(2):
      x = nnx.bridge.to_linen(NNXBlock, 4, name=f'blocks_{i}')(x)
    return nn.Dense(2, name='head')(x)


@pytest.mark.parametrize(
  'function',
  [
    anatomy,
    lambda model: module_paths(model, VECTORS),
    lambda model: apply(model, {}, VECTORS),
    lambda model: capture(model, {}, ['fc1'], VECTORS),
  ],
  ids=['anatomy', 'module_paths', 'apply', 'capture'],
)
def test_nnx_modules_are_refused_with_the_way_to_bridge_them(function):
  model = NNXBlock(6, rngs=nnx.Rngs(0))
  with pytest.raises(
    ValueError, match=r'NNX module, NNXBlock.*nnx.bridge.to_linen\(NNXBlock, \.\.\.\)'
  ):
    function(model)


def test_a_trained_nnx_module_is_bridged_with_its_weights():
  trained = NNXBlock(6, rngs=nnx.Rngs(0))
  model = nnx.bridge.to_linen(NNXBlock, 6)
  variables = {'params': nnx.to_pure_dict(nnx.state(trained, nnx.Param))}
  assert_close(apply(model, variables, VECTORS), trained(VECTORS), 1e-6)
  shapes = jax.eval_shape(model.init, jax.random.key(0), VECTORS)
  assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, dict(shapes))


@pytest.mark.exhaustive
def test_hooks_work_around_bridged_blocks_and_on_their_kernels():
  model = Shell()
  own = Anatomy(('embed',), ('blocks_0', 'blocks_1'), 'blocks_1', ('head',))
  own.check(model, VECTORS)
  variables = jax.jit(model.init)(jax.random.key(0), VECTORS)

  @jax.jit
  def run(variables, hooks_off):
    hook = Hook('blocks_0', call=lambda site, call, x: jnp.where(hooks_off, x, call(x)))
    return capture(model, variables, ['embed', *own.block_paths], VECTORS, hooks=[hook])

  y, captured = run(variables, False)
  assert_close(y, jax.jit(model.apply)(variables, VECTORS), 1e-6)
  assert captured['blocks_1'].shape == (2, 4)
  _, dropped = run(variables, True)
  assert_close(dropped['blocks_0'], captured['embed'], 1e-6)
  batches = [random_images((32, 6))]
  rules = uniform_rules(2, path=r'blocks_\d/.*')
  compensated = compensate(ptq(model, variables, batches, rules, anatomy=own), batches)
  assert compensated.report.paths == own.block_paths
  assert np.all(compensated.report.error_after < compensated.report.error_before)
  params = map_matching(lambda _, w: 0 * w, variables['params'], r'blocks_\d/fc2/.*')
  _, captured = run({'params': params}, False)
  assert_close(captured['blocks_1'], captured['embed'], 1e-6)
