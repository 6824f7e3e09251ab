"""What can be cut out of convolutional networks."""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxlab.compression.structure import (
  Cut,
  Group,
  Structure,
  describe,
  made_by,
  of_norm,
  read_by,
  shrunk,
)
from jaxlab.models.anatomy import anatomy
from jaxlab.models.mobilenetv2 import MobileNetV2, scale_channels
from jaxlab.models.resnet import ResNet
from jaxlab.models.vgg import VGG


class _Groups:
  """Groups while they are collected: cuts by name, and sizes."""

  def __init__(self):
    self.sizes: dict[str, int] = {}
    self.cuts: dict[str, list[Cut]] = {}

  def add(self, name: str, size: int, cuts: Iterable[Cut]) -> None:
    self.sizes[name] = size
    self.cuts.setdefault(name, []).extend(cuts)

  def made(self) -> dict[str, Group]:
    return {name: Group(self.sizes[name], tuple(cuts)) for name, cuts in self.cuts.items()}


def _stages(model: ResNet | MobileNetV2) -> tuple[tuple[str, ...], ...]:
  """Returns the paths of each stage's blocks."""
  first, stem = (1, 'layer') if isinstance(model, ResNet) else (0, 'blocks_')
  stages = enumerate(model.stage_sizes, first)
  return tuple(tuple(f'{stem}{stage}_{i}' for i in range(size)) for stage, size in stages)


def _identities(model: Any) -> dict[str, bool]:
  """Returns whether each block adds its input as it is, by path."""
  return {block.path: block.shortcut == 'identity' for block in anatomy(model).blocks}


@describe.register
def _resnet(model: ResNet) -> Structure:
  identity, groups = _identities(model), _Groups()
  padded, deep = model.shortcut == 'pad', model.stem == 'deep'
  bottleneck = model.block_class.expansion == 4
  down = 1 if model.shortcut == 'average' else 0
  # The stem's channels belong to the first trunk where the first block adds them as they are.
  trunk = None if model.stem == 'identity' else 'stem'
  if trunk:
    groups.add(trunk, model.width, made_by('conv1_6' if deep else 'conv1', 'bn1'))
    if identity['layer1_0']:
      groups.cuts['layer1'], trunk = groups.cuts.pop('stem'), 'layer1'
      groups.sizes['layer1'] = groups.sizes.pop('stem')
  inner_widths = iter(model.inner_widths or [None] * sum(model.stage_sizes))
  for stage, size in enumerate(model.stage_sizes):
    own, width = f'layer{stage + 1}', model.stage_widths[stage]
    for index in range(size):
      path, inner = f'{own}_{index}', next(inner_widths)
      last = 3 if bottleneck else 2
      inner = inner or (_plain_inner(model, stage),) * (last - 1)
      source = trunk if index == 0 else own
      if source:
        groups.cuts[source] += read_by(f'{path}/conv1')
      for number in range(1, last):
        layer = f'{path}/conv{number}'
        groups.add(layer, inner[number - 1], made_by(layer, f'{path}/bn{number}'))
        groups.cuts[layer] += read_by(f'{path}/conv{number + 1}')
      groups.add(own, width, made_by(f'{path}/conv{last}', f'{path}/bn{last}'))
      if not identity[path] and not padded:
        shortcut = f'{path}/downsample_{down}'
        groups.cuts[own] += made_by(shortcut, f'{path}/downsample_{down + 1}')
        if source:
          groups.cuts[source] += read_by(shortcut)
    trunk = own
  if model.num_classes is not None:
    groups.cuts[trunk] += read_by('fc')
  found = groups.made()
  if padded:
    found = {name: group for name, group in found.items() if '/' in name}
  if model.cardinality != 1:
    found = {name: group for name, group in found.items() if '/' not in name}
  if deep:
    # The stem's other layers have half of its channels.
    found.pop('layer1' if identity['layer1_0'] else 'stem', None)
  return Structure(found, tuple(path for path, own in identity.items() if own), _stages(model))


def _plain_inner(model: ResNet, stage: int) -> int:
  """Returns the inner channels of a stage's blocks that no `inner_widths` says."""
  features = (model.widths or [model.width * 2**i for i in range(stage + 1)])[stage]
  wide = model.block_class.expansion == 4
  return features * model.base_width // 64 * model.cardinality if wide else features


@shrunk.register
def _(model: ResNet, sizes: Mapping[str, int], heads: Mapping[str, int], gone: set[str]) -> ResNet:
  del heads
  identity, found = _identities(model), {}
  kept = [[path for path in stage if path not in gone] for stage in _stages(model)]
  last = 3 if model.block_class.expansion == 4 else 2
  if model.cardinality == 1:
    found['inner_widths'] = tuple(
      tuple(sizes[f'{path}/conv{number}'] for number in range(1, last))
      for stage in kept
      for path in stage
    )
  if model.shortcut != 'pad':
    trunks = enumerate(model.stage_widths)
    found['trunk_widths'] = tuple(sizes.get(f'layer{i + 1}', width) for i, width in trunks)
    found['projections'] = tuple(not identity[f'layer{i + 1}_0'] for i in range(len(kept)))
    found['width'] = sizes.get('layer1' if identity['layer1_0'] else 'stem', model.width)
    # They no longer follow from the stem's.
    doubled = (model.width * 2**stage for stage in range(len(model.stage_sizes)))
    found['widths'] = tuple(model.widths or doubled)
  return model.clone(stage_sizes=tuple(len(stage) for stage in kept), **found)


@describe.register
def _mobilenetv2(model: MobileNetV2) -> Structure:
  if model.squeeze is not None:
    raise ValueError(
      f'{type(model).__name__} with squeeze={model.squeeze}: what gates of squeeze-and-excitation read is '
      f'not known here; take a network with squeeze=None.'
    )
  identity, groups = _identities(model), _Groups()
  trunk = 'conv_stem'
  groups.add(trunk, model.stem_width, made_by('conv_stem', 'bn1'))
  widths = inner_widths(model)
  for stage, size in enumerate(model.stage_sizes):
    for index in range(size):
      path = f'blocks_{stage}_{index}'
      own = trunk if identity[path] else f'blocks_{stage}'
      if stage:
        hidden = f'{path}/conv_pw'
        groups.cuts[trunk] += read_by(hidden)
        groups.add(hidden, widths[path], made_by(hidden, f'{path}/bn1'))
        groups.cuts[hidden] += (
          *made_by(f'{path}/conv_dw', f'{path}/bn2'), *read_by(f'{path}/conv_pwl')
        )  # fmt: skip
        last, norm = f'{path}/conv_pwl', f'{path}/bn3'
      else:
        groups.cuts[trunk] += (
          *made_by(f'{path}/conv_dw', f'{path}/bn1'), *read_by(f'{path}/conv_pw')
        )  # fmt: skip
        last, norm = f'{path}/conv_pw', f'{path}/bn2'
      groups.add(own, model.widths[stage], made_by(last, norm))
      trunk = own
  groups.cuts[trunk] += read_by('conv_head')
  groups.add('conv_head', model.head_width, made_by('conv_head', 'bn2'))
  if model.num_classes is not None:
    groups.cuts['conv_head'] += read_by('classifier')
  parts = tuple(path for path, own in identity.items() if own)
  return Structure(groups.made(), parts, _stages(model))


def inner_widths(model: MobileNetV2) -> dict[str, int]:
  """Returns the channels of each block's depthwise convolution."""
  given = iter(model.inner_widths or [None] * sum(model.stage_sizes))
  found, channels = {}, model.stem_width
  for stage, size in enumerate(model.stage_sizes):
    for index in range(size):
      own = next(given)
      plain = scale_channels(channels, model.expansion) if stage else channels
      found[f'blocks_{stage}_{index}'] = (own or plain) if stage else channels
      channels = model.widths[stage]
  return found


@shrunk.register
def _(
  model: MobileNetV2, sizes: Mapping[str, int], heads: Mapping[str, int], gone: set[str]
) -> MobileNetV2:
  del heads
  identity = _identities(model)
  kept, widths, trunk = [], [], 'conv_stem'
  inner: list[int] = []
  for stage, paths in enumerate(_stages(model)):
    for path in paths:
      trunk = trunk if identity[path] else f'blocks_{stage}'
    kept.append([path for path in paths if path not in gone])
    widths.append(sizes[trunk])
    inner += [sizes[f'{path}/conv_pw'] if stage else 0 for path in kept[-1]]
  return model.clone(
    stage_sizes=tuple(len(stage) for stage in kept),
    widths=tuple(widths),
    stem_width=sizes['conv_stem'],
    head_width=sizes['conv_head'],
    inner_widths=tuple(inner),
    shortcuts=tuple(identity[f'blocks_{stage}_0'] for stage in range(len(kept))),
  )


@describe.register
def _vgg(model: VGG) -> Structure:
  if type(model) is not VGG:
    raise ValueError(f'What can be cut out of {type(model).__name__} is not known.')
  groups, parts = _Groups(), anatomy(model)
  plain = [width for width, size in zip(model.widths, model.stage_sizes) for _ in range(size)]
  layers = [*parts.stem, *(path for block in parts.blocks for path in block.layers)]
  readers = [*layers[1:], *([] if model.hidden is None else ['pre_logits/fc1'])]
  if model.hidden is None and model.num_classes is not None:
    readers.append('head/fc')
  for layer, size in zip(layers, model.conv_widths or plain, strict=True):
    norm = 'bn1' if layer == 'conv1' else layer.removesuffix('conv') + 'bn'
    groups.add(layer, size, made_by(layer) + (of_norm(norm) if model.batch_norm else ()))
  for layer, reader in zip(layers, readers):
    groups.cuts[layer] += read_by(reader)
  return Structure(groups.made())


@shrunk.register
def _(model: VGG, sizes: Mapping[str, int], heads: Mapping[str, int], gone: set[str]) -> VGG:
  del heads, gone
  return model.clone(conv_widths=tuple(sizes.values()))
