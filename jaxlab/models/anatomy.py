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
from jaxlab.models.classifier_heads import Classifier
from jaxlab.models.gpt2 import GPT2
from jaxlab.models.heads import DINOHead, MLPHead
from jaxlab.models.intercept import check_linen
from jaxlab.models.llama import Llama
from jaxlab.models.mlp import MLP
from jaxlab.models.mobilenetv2 import MobileNetV2
from jaxlab.models.resnet import BLOCKS, BasicBlock, Bottleneck, ResNet
from jaxlab.models.siamese import Encoder
from jaxlab.models.swin import Swin
from jaxlab.models.vit import ViT
from jaxlab.models.wide_resnet import WideResNet


def anatomy(model: nn.Module) -> Anatomy:
  """Returns the anatomy of a network of this library.

  Knows `ResNet`, `WideResNet`, `MobileNetV2`, `ViT`, `Swin`, `GPT2`, `Llama`, `MLP`, their subclasses, and
  `Encoder` and `Classifier` around them, from their fields alone: nothing is traced.

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
  return _describe(model)


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
  block = BLOCKS[model.block] if isinstance(model.block, str) else model.block
  if not (isinstance(block, type) and issubclass(block, BasicBlock | Bottleneck)):
    raise ValueError(
      f'The parts of a ResNet with block={block!r} are not known: name them by an Anatomy.'
    )
  layers = (1, 2, 3) if issubclass(block, Bottleneck) else (1, 2)
  widths = model.widths or [model.width * 2**stage for stage in range(len(model.stage_sizes))]
  blocks, norms, channels = [], [Norm('bn1', 'conv1')], model.width
  for stage, size in enumerate(model.stage_sizes):
    for index in range(size):
      path = f'layer{stage + 1}_{index}'
      features = widths[stage] * block.expansion
      same = channels == features and (index > 0 or model.strides[stage] == 1)
      branch = Branch('conv', tuple(f'{path}/conv{i}' for i in layers), f'{path}/bn{layers[-1]}')
      norms += [Norm(f'{path}/bn{i}', f'{path}/conv{i}') for i in layers]
      projection = () if same or model.shortcut == 'pad' else (f'{path}/downsample_0',)
      norms += [Norm(f'{path}/downsample_1', own) for own in projection]
      kind = 'identity' if same else 'projection'
      blocks.append(Block(path, (branch,), kind, projection))
      channels = features
  head = () if model.num_classes is None else ('fc',)
  return Anatomy(('conv1',), tuple(blocks), 'avgpool', head, norms=tuple(norms))


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
  head = () if model.num_classes is None else ('linear',)
  return Anatomy(('conv1',), tuple(blocks), 'avgpool', head, norms=(*norms, Norm('bn1')))


@_describe.register
def _mobilenetv2(model: MobileNetV2) -> Anatomy:
  blocks, norms, channels = [], [Norm('bn1', 'conv_stem')], model.stem_width
  for stage, size in enumerate(model.stage_sizes):
    names = ('conv_pw', 'conv_dw', 'conv_pwl') if stage else ('conv_dw', 'conv_pw')
    for index in range(size):
      path = f'blocks_{stage}_{index}'
      same = channels == model.widths[stage] and (index > 0 or model.strides[stage] == 1)
      layers = tuple(f'{path}/{name}' for name in names)
      own = [Norm(f'{path}/bn{i + 1}', layer) for i, layer in enumerate(layers)]
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
  return Block(path, tuple(branches), 'identity', stacked=stacked), tuple(norms)


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
_LLAMA_BLOCK = (
  'self_attn',
  'mlp',
  ('input_layernorm', ('q_proj', 'k_proj', 'v_proj'), ('q_proj', 'k_proj', 'v_proj', 'o_proj')),
  ('post_attention_layernorm', ('gate_proj', 'up_proj'), ('gate_proj', 'up_proj', 'down_proj')),
)


def _split(made: Iterable[tuple[Block, tuple[Norm, Norm]]]) -> tuple[tuple[Block, ...], list[Norm]]:
  """Returns the blocks, and their norms in order."""
  made = list(made)
  return tuple(block for block, _ in made), [norm for _, norms in made for norm in norms]


@_describe.register
def _vit(model: ViT) -> Anatomy:
  if model.scan:
    made = [_transformer_block('blocks', *_VIT_BLOCK, stacked=model.depth)]
  else:
    made = [_transformer_block(f'blocks_{i}', *_VIT_BLOCK) for i in range(model.depth)]
  blocks, norms = _split(made)
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
      path = f'layers_{stage}/downsample'
      layer = f'{path}/reduction'
      transitions.append(Block(path, (Branch('merge', (layer,), layer),), 'none'))
      norms.append(Norm(f'{path}/norm', readers=(layer,)))
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
def _llama(model: Llama) -> Anatomy:
  blocks = (_transformer_block(f'layers_{i}', *_LLAMA_BLOCK) for i in range(model.depth))
  return _decoder(('embed_tokens',), blocks, 'norm', model.tied)


@_describe.register
def _mlp(model: MLP) -> Anatomy:
  layers = tuple(f'fc{i}' for i in range(len(model.hidden)))
  features = f'relu{len(layers) - 1}' if layers else None
  head = () if model.num_classes is None else ('fc',)
  return Anatomy(layers[:1], (), features, head, neck=layers[1:])


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
