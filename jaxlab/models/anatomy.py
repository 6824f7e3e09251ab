"""What a network consists of: the names of its stem, blocks, branches, normalizations, features and head.

`anatomy(model)` knows the networks of this library; methods ask it where to work instead of carrying regular
expressions for each network. Paths are those of `module_paths`, so they serve as patterns of hooks
(`any_of(paths)`) and, followed by `/kernel`, as names of parameters. Whoever brings a network of her own
describes it once and hands the description to methods as `anatomy=`:

  own = Anatomy(stem=('embed',), blocks=('blocks_0', 'blocks_1'), features='norm', head=('head',))
  own.check(model, x)

Networks of flax NNX are bridged block by block; each block then is one module, around which hooks work, and
whose kernels lie in `params`:

  class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
      for i in range(12):
        x = nnx.bridge.to_linen(MyBlock, width, name=f'blocks_{i}')(x)
      return x
"""

import dataclasses
import functools
from collections.abc import Iterable

from flax import linen as nn

from jaxlab.models.anatomy_parts import Anatomy, Block, Branch, Norm, Paths
from jaxlab.models.bert import Bert
from jaxlab.models.bilinear import BilinearCNN
from jaxlab.models.bloom import Bloom
from jaxlab.models.classifier_heads import AdaptedLinear, Classifier
from jaxlab.models.cnn13 import CNN13
from jaxlab.models.convnet import ConvNet
from jaxlab.models.convnext import ConvNeXt
from jaxlab.models.coordinate_head import CoordinateHead
from jaxlab.models.densenet import DenseNet
from jaxlab.models.gpt2 import GPT2
from jaxlab.models.heads import DINOHead, MLPHead
from jaxlab.models.intercept import check_linen
from jaxlab.models.llama import Llama
from jaxlab.models.mlp import MLP
from jaxlab.models.mobilenetv2 import MobileNetV2
from jaxlab.models.pvt import PVT
from jaxlab.models.resnet import BasicBlock, Bottleneck, ResNet
from jaxlab.models.shake_shake import ShakeShake
from jaxlab.models.siamese import Encoder
from jaxlab.models.swin import Swin
from jaxlab.models.t2t import T2TViT
from jaxlab.models.vgg import VGG
from jaxlab.models.vit import ViT
from jaxlab.models.wide_resnet import WideResNet


def anatomy(model: nn.Module) -> Anatomy:
  """Returns the anatomy of a network of this library.

  Knows the image networks and the transformers over tokens, their subclasses, and `Encoder` and `Classifier`
  around them, from their fields alone: nothing is traced.

  Raises:
    ValueError: for any other model: describe it by an `Anatomy`. For an NNX module the message says how to
      bridge it.

  >>> from jaxlab.models import create
  >>> parts = anatomy(create('vit_tiny_patch16_224', depth=2))
  >>> parts.edges, parts.block_paths, parts.features
  (('patch_embed/proj', 'head'), ('blocks_0', 'blocks_1'), 'pool')
  >>> parts.blocks[1].branches[0].layers
  ('blocks_1/attention/qkv', 'blocks_1/attention/proj')
  """
  check_linen(model)
  found = _describe(model)
  # In all layers of this library the outputs are the last axis.
  return dataclasses.replace(
    found, norms=tuple(dataclasses.replace(norm, axis=-1) for norm in found.norms)
  )


@functools.singledispatch
def _describe(model: nn.Module) -> Anatomy:
  known = ', '.join(kind.__name__ for kind in _describe.registry if kind is not object)
  raise ValueError(
    f'The parts of {type(model).__name__} are not known (known are {known}). Name them by an Anatomy, e.g. '
    f"anatomy=models.Anatomy(stem=('embed',), blocks=('blocks_0', 'blocks_1'), features='norm', "
    f"head=('head',)); models.module_paths(model, x) lists all paths."
  )


@_describe.register
def _resnet(model: ResNet) -> Anatomy:
  block = model.block_class
  if not (isinstance(block, type) and issubclass(block, BasicBlock | Bottleneck)):
    raise ValueError(
      f'The parts of a ResNet with block={block!r} are not known: name them by an Anatomy.'
    )
  layers = (1, 2, 3) if issubclass(block, Bottleneck) else (1, 2)
  stems = {'deep': ('conv1_0', 'conv1_3', 'conv1_6'), 'identity': ()}
  stem = stems.get(model.stem, ('conv1',))
  after = {'deep': ('conv1_1', 'conv1_4', 'bn1'), 'identity': ()}.get(model.stem, ('bn1',))
  norms = [Norm(path, layer) for path, layer in zip(after, stem, strict=True)]
  # Without a stem the first block sees the image, whose channels are those of no block.
  blocks, channels = [], None if model.stem == 'identity' else model.width
  down = 1 if model.shortcut == 'average' else 0
  for stage, size in enumerate(model.stage_sizes):
    for index in range(size):
      path = f'layer{stage + 1}_{index}'
      features = model.stage_widths[stage]
      same = channels == features and (index > 0 or model.strides[stage] == 1)
      if model.projections and index == 0:
        same = not model.projections[stage]
      branch = Branch('conv', tuple(f'{path}/conv{i}' for i in layers), f'{path}/bn{layers[-1]}')
      norms += [Norm(f'{path}/bn{i}', f'{path}/conv{i}') for i in layers]
      projection = () if same or model.shortcut == 'pad' else (f'{path}/downsample_{down}',)
      norms += [Norm(f'{path}/downsample_{down + 1}', own) for own in projection]
      kind = 'identity' if same else 'projection'
      blocks.append(Block(path, (branch,), kind, projection))
      channels = features
  head = () if model.num_classes is None else ('fc',)
  return Anatomy(stem, tuple(blocks), 'avgpool', head, norms=tuple(norms))


@_describe.register
def _wide_resnet(model: WideResNet) -> Anatomy:
  blocks, norms, channels = [], [], model.stem_width
  for stage, size in enumerate(model.stage_sizes):
    for index in range(size):
      path = f'block{stage + 1}/layer_{index}'
      same = channels == model.widths[stage]
      branch = Branch('conv', (f'{path}/conv1', f'{path}/conv2'), f'{path}/conv2')
      projection = () if same else (f'{path}/convShortcut',)
      kind = 'identity' if same else 'projection'
      blocks.append(Block(path, (branch,), kind, projection))
      norms += [Norm(f'{path}/bn1'), Norm(f'{path}/bn2', f'{path}/conv1')]
      channels = model.widths[stage]
  if model.final_norm:
    norms.append(Norm('bn1'))
  head = () if model.num_classes is None else ('linear',)
  return Anatomy(('conv1',), tuple(blocks), 'avgpool', head, norms=tuple(norms))


@_describe.register
def _shake_shake(model: ShakeShake) -> Anatomy:
  blocks, norms, channels = [], [], model.stem_width
  for stage, size in enumerate(model.stage_sizes):
    for index in range(size):
      path, strides = f'layer{stage + 1}_{index}', stage > 0 and index == 0
      branches = []
      for name in 'ab':
        layers = tuple(f'{path}/conv_{name}{i}' for i in (1, 2))
        branches.append(Branch('conv', layers, f'{path}/bn_{name}2'))
        norms += [Norm(f'{path}/bn_{name}{i}', own) for i, own in enumerate(layers, 1)]
      projection = ()
      if strides:
        projection = (f'{path}/downsample/conv',)
        norms.append(Norm(f'{path}/downsample/bn', *projection))
      elif channels != model.widths[stage]:
        projection = (f'{path}/downsample_0',)
        norms.append(Norm(f'{path}/downsample_1', *projection))
      kind = 'projection' if projection else 'identity'
      blocks.append(Block(path, tuple(branches), kind, projection))
      channels = model.widths[stage]
  head = () if model.num_classes is None else ('fc',)
  return Anatomy(('conv1',), tuple(blocks), 'avgpool', head, norms=tuple(norms))


@_describe.register
def _mobilenetv2(model: MobileNetV2) -> Anatomy:
  blocks, norms, channels = [], [Norm('bn1', 'conv_stem')], model.stem_width
  for stage, size in enumerate(model.stage_sizes):
    inner, last = (('conv_pw', 'conv_dw'), 'conv_pwl') if stage else (('conv_dw',), 'conv_pw')
    squeeze = () if model.squeeze is None else ('se/conv_reduce', 'se/conv_expand')
    for index in range(size):
      path = f'blocks_{stage}_{index}'
      same = channels == model.widths[stage] and (index > 0 or model.strides[stage] == 1)
      if model.shortcuts and index == 0:
        same = model.shortcuts[stage]
      layers = tuple(f'{path}/{name}' for name in (*inner, *squeeze, last))
      normed = enumerate((*inner, last))
      own = [Norm(f'{path}/bn{i + 1}', f'{path}/{layer}') for i, layer in normed]
      branch = Branch('conv', layers, own[-1].path)
      blocks.append(Block(path, (branch,), 'identity' if same else 'none'))
      norms, channels = norms + own, model.widths[stage]
  norms.append(Norm('bn2', 'conv_head'))
  head = () if model.num_classes is None else ('classifier',)
  parts = {'neck': ('conv_head',), 'norms': tuple(norms)}
  return Anatomy(('conv_stem',), tuple(blocks), 'avgpool', head, **parts)


def _transformer_block(
  path: str,
  attention: str,
  mlp: str,
  first: tuple[str, Paths, Paths],
  second: tuple[str, Paths, Paths],
  stacked: int | None = None,
) -> tuple[Block, tuple[Norm, Norm]]:
  """Returns a pre-norm block and its norms; each branch is (norm, layers that read it, all layers)."""
  branches, norms = [], []
  for kind, name, (norm, readers, layers) in (
    ('attention', attention, first), ('mlp', mlp, second)
  ):  # fmt: skip
    own = f'{path}/{name}'
    branches.append(Branch(kind, tuple(f'{own}/{layer}' for layer in layers), own))
    norms.append(Norm(f'{path}/{norm}', readers=tuple(f'{own}/{reader}' for reader in readers)))
  stream = (f'{path}/residual', path)
  block = Block(path, tuple(branches), 'identity', stacked=stacked, stream=stream)
  return block, tuple(norms)


def _scaled(block: Block, names: Paths) -> Block:
  """Returns the block whose branches end in layer scales of these names."""
  scaled = zip(block.branches, names, strict=True)
  branches = (dataclasses.replace(own, output=f'{block.path}/{name}') for own, name in scaled)
  return dataclasses.replace(block, branches=tuple(branches))


_VIT_BLOCK = (
  'attention',
  'mlp',
  ('norm1', ('qkv',), ('qkv', 'proj')),
  ('norm2', ('fc1',), ('fc1', 'fc2')),
)
_GPT2_BLOCK = (
  'attn',
  'mlp',
  ('ln_1', ('c_attn',), ('c_attn', 'c_proj')),
  ('ln_2', ('c_fc',), ('c_fc', 'c_proj')),
)
_BLOOM_BLOCK = (
  'self_attention',
  'mlp',
  ('input_layernorm', ('query_key_value',), ('query_key_value', 'dense')),
  ('post_attention_layernorm', ('dense_h_to_4h',), ('dense_h_to_4h', 'dense_4h_to_h')),
)
_BERT_BLOCK = (
  'attention',
  'mlp',
  ('norm1', (), ('q_proj', 'k_proj', 'v_proj', 'proj')),
  ('norm2', (), ('fc1', 'fc2')),
)
_LLAMA_BLOCK = (
  'self_attn',
  'mlp',
  ('input_layernorm', ('q_proj', 'k_proj', 'v_proj'), ('q_proj', 'k_proj', 'v_proj', 'o_proj')),
  ('post_attention_layernorm', ('gate_proj', 'up_proj'), ('gate_proj', 'up_proj', 'down_proj')),
)


def _present(
  made: Iterable[tuple[Block, tuple[Norm, ...]]],
  attention_widths: Iterable[int] | None,
  hidden_widths: Iterable[int] | None,
) -> list[tuple[Block, tuple[Norm, ...]]]:
  """Returns blocks and norms without the branches that have no channels."""
  made = list(made)
  widths = zip(attention_widths or [1] * len(made), hidden_widths or [1] * len(made), strict=True)
  found = []
  for (block, norms), sizes in zip(made, widths, strict=not made or made[0][0].stacked is None):
    gone = [f'{block.path}/{name}' for name, size in zip(('norm1', 'norm2'), sizes) if not size]
    if not sizes[0]:
      gone.append(f'{block.path}/attention/norm')
    branches = tuple(own for own, size in zip(block.branches, sizes, strict=True) if size)
    kept = tuple(norm for norm in norms if norm.path not in gone)
    found.append((dataclasses.replace(block, branches=branches), kept))
  return found


def _split(made: Iterable[tuple[Block, tuple[Norm, ...]]]) -> tuple[tuple[Block, ...], list[Norm]]:
  """Returns the blocks, and their norms in order."""
  made = list(made)
  return tuple(block for block, _ in made), [norm for _, norms in made for norm in norms]


@_describe.register
def _vit(model: ViT) -> Anatomy:
  if model.scan:
    made = [_transformer_block('blocks', *_VIT_BLOCK, stacked=model.depth)]
  else:
    made = [_transformer_block(f'blocks_{i}', *_VIT_BLOCK) for i in range(model.depth)]
  made = _present(made, model.attention_widths, model.hidden_widths)
  blocks, norms = _split(made)
  if model.layer_scale is not None:
    scales = {'attention': 'ls1', 'mlp': 'ls2'}
    blocks = tuple(
      _scaled(block, tuple(scales[own.kind] for own in block.branches)) for block in blocks
    )
  if model.pre_norm:
    norms = [Norm('norm_pre'), *norms]
  heads = ('head', 'head_dist') if model.distilled else ('head',)
  head = () if model.num_classes is None else heads
  return Anatomy(('patch_embed/proj',), blocks, 'pool', head, norms=(*norms, Norm('norm')))


@_describe.register
def _swin(model: Swin) -> Anatomy:
  blocks, transitions, norms = [], [], [Norm('patch_embed/norm', 'patch_embed/proj')]
  size = model.stage_grid(0)
  for stage, depth in enumerate(model.depths):
    if stage:
      size = tuple((side + 1) // 2 for side in size)
      transitions.append(_merging(f'layers_{stage}/downsample'))
      norms.append(Norm(f'{transitions[-1].path}/norm', readers=transitions[-1].layers))
    names = [f'layers_{stage}/blocks_{i}' for i in range(depth)]
    own, own_norms = _split(_transformer_block(name, *_VIT_BLOCK) for name in names)
    window, _ = model.stage_window(stage)
    if any(side % of_window for side, of_window in zip(size, window, strict=True)):
      # Windows are filled with zeros behind the norm: its layer reads more than its output.
      first = {branches.path + '/norm1' for branches in own}
      own_norms = [Norm(norm.path) if norm.path in first else norm for norm in own_norms]
    blocks, norms = [*blocks, *own], [*norms, *own_norms]
  head = () if model.num_classes is None else ('head/fc',)
  parts = {'transitions': tuple(transitions), 'norms': (*norms, Norm('norm'))}
  return Anatomy(('patch_embed/proj',), tuple(blocks), 'avgpool', head, **parts)


@_describe.register
def _t2t(model: T2TViT) -> Anatomy:
  first = ('kqv',) if model.performer else ('qkv',)
  stem, norms = [], []
  for index in (1, 2):
    path = f'tokens/attention{index}'
    stem += [f'{path}/{layer}' for layer in (*first, 'proj', 'mlp/fc1', 'mlp/fc2')]
    norms.append(Norm(f'{path}/norm1', readers=(f'{path}/{first[0]}',)))
    norms.append(Norm(f'{path}/norm2', readers=(f'{path}/mlp/fc1',)))
  blocks, own = _split(_transformer_block(f'blocks_{i}', *_VIT_BLOCK) for i in range(model.depth))
  head = () if model.num_classes is None else ('head',)
  return Anatomy(
    (*stem, 'tokens/project'), blocks, 'pool', head, norms=(*norms, *own, Norm('norm'))
  )


@_describe.register
def _pvt(model: PVT) -> Anatomy:
  blocks, transitions, norms = [], [], [Norm('patch_embed/norm', 'patch_embed/proj')]
  first = 0
  for stage, depth in enumerate(model.depths):
    inside, made = slice(first, first + depth), []
    path, first = f'stages_{stage}', first + depth
    if stage:
      layer = f'{path}/downsample/proj'
      branch = Branch('merge', (layer,), f'{path}/downsample')
      transitions.append(Block(f'{path}/downsample', (branch,), 'none'))
      norms.append(Norm(f'{path}/downsample/norm', layer))
    reduced = model.reductions[stage] > 1
    attention = ('q', *(['sr'] if reduced else []), 'kv', 'proj')
    readers = ('q', 'sr') if reduced else ('q', 'kv')
    parts = ('norm1', readers, attention), ('norm2', ('fc1',), ('fc1', 'dwconv', 'fc2'))
    for index in range(depth):
      own = f'{path}/blocks_{index}'
      block, pair = _transformer_block(own, 'attention', 'mlp', *parts)
      inner = f'{own}/attention'
      if reduced:
        pair = (pair[0], Norm(f'{inner}/norm', f'{inner}/sr', (f'{inner}/kv',)), pair[1])
      made.append((block, pair))
    widths = model.attention_widths, model.hidden_widths
    own, own_norms = _split(_present(made, *(given and given[inside] for given in widths)))
    blocks, norms = [*blocks, *own], [*norms, *own_norms]
    norms.append(Norm(f'{path}/norm'))
  head = () if model.num_classes is None else ('head',)
  parts = {'transitions': tuple(transitions), 'norms': tuple(norms)}
  return Anatomy(('patch_embed/proj',), tuple(blocks), 'avgpool', head, **parts)


@_describe.register
def _convnext(model: ConvNeXt) -> Anatomy:
  blocks, transitions, norms = [], [], [Norm('stem_1', 'stem_0')]
  for stage, depth in enumerate(model.depths):
    if stage:
      transitions.append(_merging(f'stages_{stage}/downsample'))
      norms.append(Norm(f'{transitions[-1].path}/norm', readers=transitions[-1].layers))
    for index in range(depth):
      path = f'stages_{stage}/blocks_{index}'
      layers = tuple(f'{path}/{name}' for name in ('conv_dw', 'mlp/fc1', 'mlp/fc2'))
      output = f'{path}/mlp' if model.layer_scale is None else f'{path}/ls'
      blocks.append(Block(path, (Branch('conv', layers, output),), 'identity'))
      norms.append(Norm(f'{path}/norm', layers[0], layers[1:2]))
  head = () if model.num_classes is None else ('head/fc',)
  norms.append(Norm('head/norm', readers=head))
  parts = {'transitions': tuple(transitions), 'norms': tuple(norms)}
  return Anatomy(('stem_0',), tuple(blocks), 'head/norm', head, **parts)


def _merging(path: str) -> Block:
  """Returns the module between stages that halves the size by its layer `reduction`."""
  layer = f'{path}/reduction'
  return Block(path, (Branch('merge', (layer,), layer),), 'none')


@_describe.register
def _densenet(model: DenseNet) -> Anatomy:
  blocks, transitions, norms = [], [], [Norm('norm0', 'conv0')]
  for number, size in enumerate(model.block_sizes, 1):
    for index in range(1, size + 1):
      path = f'denseblock{number}/denselayer{index}'
      layers = (f'{path}/conv1', f'{path}/conv2')
      blocks.append(Block(path, (Branch('conv', layers, layers[-1]),), 'none'))
      norms += [Norm(f'{path}/norm1'), Norm(f'{path}/norm2', layers[0])]
    if number < len(model.block_sizes):
      path = f'transition{number}'
      transitions.append(Block(path, (Branch('merge', (f'{path}/conv',), f'{path}/pool'),), 'none'))
      norms.append(Norm(f'{path}/norm'))
  head = () if model.num_classes is None else ('classifier',)
  parts = {'transitions': tuple(transitions), 'norms': (*norms, Norm('norm5'))}
  return Anatomy(('conv0',), tuple(blocks), 'avgpool', head, **parts)


@_describe.register
def _vgg(model: VGG) -> Anatomy:
  stages = enumerate(model.stage_sizes)
  paths = [f'blocks_{stage}_{i}' for stage, size in stages for i in range(size)][1:]
  blocks, norms = [], [Norm('bn1', 'conv1')]
  for path in paths:
    layer, norm = f'{path}/conv', f'{path}/bn'
    blocks.append(
      Block(path, (Branch('conv', (layer,), norm if model.batch_norm else layer),), 'none')
    )
    norms.append(Norm(norm, layer))
  head = () if model.num_classes is None else ('head/fc',)
  neck = () if model.hidden is None else ('pre_logits/fc1', 'pre_logits/fc2')
  parts = {'neck': neck, 'norms': tuple(norms) if model.batch_norm else ()}
  return Anatomy(('conv1',), tuple(blocks), 'avgpool', head, **parts)


@_describe.register
def _bilinear(model: BilinearCNN) -> Anatomy:
  head = () if model.num_classes is None else ('fc',)
  return dataclasses.replace(_vgg(model), features='pool', head=head)


def _decoder(
  embeddings: Paths, blocks: Iterable[tuple[Block, tuple[Norm, Norm]]], norm: str, tied: bool
) -> Anatomy:
  blocks, norms = _split(blocks)
  head = () if tied else ('lm_head',)
  return Anatomy(
    blocks=blocks,
    features=norm,
    head=head,
    embeddings=embeddings,
    tied=embeddings[0] if tied else None,
    norms=(*norms, Norm(norm, readers=head)),
  )


@_describe.register
def _gpt2(model: GPT2) -> Anatomy:
  blocks = (_transformer_block(f'h_{i}', *_GPT2_BLOCK) for i in range(model.depth))
  return _decoder(('wte', 'wpe'), blocks, 'ln_f', model.tied)


@_describe.register
def _bloom(model: Bloom) -> Anatomy:
  blocks = (_transformer_block(f'h_{i}', *_BLOOM_BLOCK) for i in range(model.depth))
  own = _decoder(('word_embeddings',), blocks, 'ln_f', model.tied)
  return dataclasses.replace(own, norms=(Norm('word_embeddings_layernorm'), *own.norms))


@_describe.register
def _llama(model: Llama) -> Anatomy:
  blocks = (_transformer_block(f'layers_{i}', *_LLAMA_BLOCK) for i in range(model.depth))
  return _decoder(('embed_tokens',), blocks, 'norm', model.tied)


@_describe.register
def _bert(model: Bert) -> Anatomy:
  made = [_transformer_block(f'layer_{i}', *_BERT_BLOCK) for i in range(model.depth)]
  # Behind a norm its block's shortcut reads as well as the layers.
  norms = [Norm(norm.path) for _, norms in made for norm in norms]
  embeddings = ('word_embeddings', 'token_type_embeddings', 'position_embeddings')
  return Anatomy(
    blocks=tuple(dataclasses.replace(block, shortcut='normalized', stream=()) for block, _ in made),
    features=made[-1][0].path if made else 'embeddings',
    head=() if model.num_classes is None else ('classifier',),
    embeddings=embeddings,
    norms=(Norm('norm'), *norms),
  )


@_describe.register
def _mlp(model: MLP) -> Anatomy:
  layers = tuple(f'fc{i}' for i in range(len(model.hidden)))
  features = f'relu{len(layers) - 1}' if layers else None
  head = () if model.num_classes is None else ('fc',)
  return Anatomy(layers[:1], (), features, head, neck=layers[1:])


@_describe.register
def _convnet(model: ConvNet) -> Anatomy:
  convs = tuple(f'conv{i}' for i in range(len(model.widths)))
  dense = tuple(f'fc{i}' for i in range(len(model.hidden)))
  features = f'relu{len(dense) - 1}' if dense else f'pool{len(convs) - 1}'
  norms = tuple(Norm(f'bn{i}', conv) for i, conv in enumerate(convs))
  head = () if model.num_classes is None else ('fc',)
  return Anatomy(convs[:1], (), features, head, neck=(*convs[1:], *dense), norms=norms)


@_describe.register
def _cnn13(model: CNN13) -> Anatomy:
  convs = tuple(f'conv{i}' for i in range(9))
  norms = tuple(Norm(f'bn{i}', conv) for i, conv in enumerate(convs))
  head = () if model.num_classes is None else ('fc',)
  return Anatomy(convs[:1], (), 'avgpool', head, neck=convs[1:], norms=norms)


@_describe.register
def _encoder(model: Encoder) -> Anatomy:
  return _with_head(anatomy(model.backbone), 'projector', model.projector)


@_describe.register
def _classifier(model: Classifier) -> Anatomy:
  return _with_head(anatomy(model.backbone), 'head', model.head)


def _with_head(backbone: Anatomy, name: str, head: nn.Module) -> Anatomy:
  """Returns the anatomy of `head(backbone(x))`, with the path `name` for the head."""
  own = backbone.below('backbone')
  if not own.head and not own.tied:
    own = dataclasses.replace(own, features='backbone')
  layers, norms = (name,), ()
  if isinstance(head, CoordinateHead) and not head.adapted:
    layers = (f'{name}/fc',)
  elif isinstance(head, AdaptedLinear | CoordinateHead):
    layers = (f'{name}/feat_fc', f'{name}/fc')
    own = dataclasses.replace(own, features=layers[0])
  if isinstance(head, DINOHead):
    name, head = f'{name}/mlp', MLPHead((1, 1, 1), hidden_norm=head.use_norm)
  if isinstance(head, MLPHead):
    layers = tuple(f'{name}/fc{i}' for i in range(len(head.features)))
    last = len(layers) - 1
    normed = [head.hidden_norm if i < last else head.last_norm != 'none' for i in range(last + 1)]
    norms = tuple(
      Norm(f'{name}/bn{i}', layer)
      for i, (layer, wanted) in enumerate(zip(layers, normed))
      if wanted
    )
  return dataclasses.replace(own, head=(*own.head, *layers), norms=(*own.norms, *norms))
