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

from flax import linen as nn

from jaxlab.models.anatomy_convolutional import CONVOLUTIONAL
from jaxlab.models.anatomy_parts import Anatomy, Norm
from jaxlab.models.anatomy_transformers import TRANSFORMERS
from jaxlab.models.classifier_heads import AdaptedLinear, Classifier
from jaxlab.models.coordinate_head import CoordinateHead
from jaxlab.models.heads import DINOHead, MLPHead
from jaxlab.models.intercept import check_linen
from jaxlab.models.siamese import Encoder


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


for _kind, _parts in {**CONVOLUTIONAL, **TRANSFORMERS}.items():
  _describe.register(_kind, _parts)


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
