"""The parts of convolutional networks and of perceptrons, by their fields: see `anatomy`."""

import dataclasses

from jaxlab.models.anatomy_parts import Anatomy, Block, Branch, Norm, merging
from jaxlab.models.bilinear import BilinearCNN
from jaxlab.models.cnn13 import CNN13
from jaxlab.models.convnet import ConvNet
from jaxlab.models.convnext import ConvNeXt
from jaxlab.models.densenet import DenseNet
from jaxlab.models.mlp import MLP
from jaxlab.models.mobilenetv2 import MobileNetV2
from jaxlab.models.resnet import BasicBlock, Bottleneck, ResNet
from jaxlab.models.shake_shake import ShakeShake
from jaxlab.models.vgg import VGG
from jaxlab.models.wide_resnet import WideResNet


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


def _convnext(model: ConvNeXt) -> Anatomy:
  blocks, transitions, norms = [], [], [Norm('stem_1', 'stem_0')]
  for stage, depth in enumerate(model.depths):
    if stage:
      transitions.append(merging(f'stages_{stage}/downsample'))
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


def _bilinear(model: BilinearCNN) -> Anatomy:
  head = () if model.num_classes is None else ('fc',)
  return dataclasses.replace(_vgg(model), features='pool', head=head)


def _mlp(model: MLP) -> Anatomy:
  layers = tuple(f'fc{i}' for i in range(len(model.hidden)))
  features = f'relu{len(layers) - 1}' if layers else None
  head = () if model.num_classes is None else ('fc',)
  return Anatomy(layers[:1], (), features, head, neck=layers[1:])


def _convnet(model: ConvNet) -> Anatomy:
  convs = tuple(f'conv{i}' for i in range(len(model.widths)))
  dense = tuple(f'fc{i}' for i in range(len(model.hidden)))
  features = f'relu{len(dense) - 1}' if dense else f'pool{len(convs) - 1}'
  norms = tuple(Norm(f'bn{i}', conv) for i, conv in enumerate(convs))
  head = () if model.num_classes is None else ('fc',)
  return Anatomy(convs[:1], (), features, head, neck=(*convs[1:], *dense), norms=norms)


def _cnn13(model: CNN13) -> Anatomy:
  convs = tuple(f'conv{i}' for i in range(9))
  norms = tuple(Norm(f'bn{i}', conv) for i, conv in enumerate(convs))
  head = () if model.num_classes is None else ('fc',)
  return Anatomy(convs[:1], (), 'avgpool', head, neck=convs[1:], norms=norms)


CONVOLUTIONAL = {
  ResNet: _resnet,
  WideResNet: _wide_resnet,
  ShakeShake: _shake_shake,
  MobileNetV2: _mobilenetv2,
  ConvNeXt: _convnext,
  DenseNet: _densenet,
  VGG: _vgg,
  BilinearCNN: _bilinear,
  MLP: _mlp,
  ConvNet: _convnet,
  CNN13: _cnn13,
}
