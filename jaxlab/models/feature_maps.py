"""Maps of features: what a network of pooled features hands on before it pools, and heads over it."""

from __future__ import annotations

import re

import jax
from flax import linen as nn

from jaxlab.models.anatomy import anatomy
from jaxlab.models.classifier_heads import Classifier
from jaxlab.models.convnet import ConvNet
from jaxlab.models.intercept import Hook, Site, intercepting, path_string
from jaxlab.models.mobilenetv2 import ACTIVATIONS, MobileNetV2
from jaxlab.models.resnet import ResNet
from jaxlab.models.vgg import VGG
from jaxlab.models.vit import ViT

Array = jax.Array


def feature_map_path(model: nn.Module) -> str:
  """Returns the module whose output a network pools: the last block of a ResNet, the final norm of a ViT.

  Of a MobileNetV2 it is the activation behind its last convolution.

  Raises:
    ValueError: for a network in which it is not known.

  >>> from jaxlab.models import create
  >>> [feature_map_path(create(name)) for name in ('resnet101', 'vit_base_patch16_224', 'vgg16_bn')]
  ['layer4_2', 'norm', 'pool_4']
  """
  if isinstance(model, ViT):
    return 'norm'
  if isinstance(model, ResNet):
    return anatomy(model).block_paths[-1]
  if isinstance(model, MobileNetV2):
    return f'{ACTIVATIONS[model.activation][1]}2'
  if isinstance(model, VGG):
    return f'pool_{len(model.stage_sizes) - 1}'
  if isinstance(model, ConvNet):
    return f'pool{len(model.widths) - 1}'
  raise ValueError(
    f'The map of features of {type(model).__name__} is not known (known are ResNet, MobileNetV2, VGG, '
    'ConvNet and ViT): name the module that returns it by path=; models.module_paths(model, x) lists all '
    'paths.'
  )


def feature_map(
  backbone: nn.Module, images: Array, train: bool = False, *, path: str | None = None
) -> Array:
  """Returns the map `[batch, height, width, channels]` that a bound network makes of images.

  The network runs as it is, and what one of its modules returns is taken. Of a vision transformer those are
  the patch tokens, without class token, distillation token and registers, in their places. Hooks reach the
  map from all modules in front of it and within it; those on the output of the very module do not.

  Args:
    backbone: bound to variables: a submodule, or `model.bind(variables)`.
    images: `[batch, height, width, channels]`, normalized.
    train: as the network takes it.
    path: of the module; None: `feature_map_path`.

  Raises:
    ValueError: if there is no such module, its output is no map, or it runs under a transformation of its own
      (`nn.remat`, `nn.scan`).

  >>> from jaxlab.models import create
  >>> model = create('cifar_resnet20', num_classes=None)
  >>> images = jax.numpy.zeros((1, 32, 32, 3))
  >>> variables = jax.eval_shape(model.init, jax.random.key(0), images)
  >>> jax.eval_shape(lambda v: feature_map(model.bind(v), images), variables).shape
  (1, 8, 8, 64)
  """
  own = feature_map_path(backbone) if path is None else path
  found: list[Array] = []

  def keep(site: Site, y: Array) -> Array:
    if site.module.scope.trace_level != backbone.scope.trace_level:
      raise ValueError(
        f'path={own!r} lies within a transformation of Linen (nn.remat, nn.scan), out of which nothing can '
        'be taken: build the network with remat=False, scan=False.'
      )
    found.append(y)
    return y

  whole = path_string((*backbone.path, *own.split('/')))
  with intercepting([Hook(re.escape(whole), output=keep)]):
    backbone(images, train=train)
  y = found[-1]
  if isinstance(backbone, ViT) and y.ndim == 3:
    rows, columns = (side // backbone.patch_size for side in images.shape[1:3])
    y = y[:, backbone.num_prefix_tokens :].reshape(len(y), rows, columns, y.shape[-1])
  if getattr(y, 'ndim', 0) != 4:
    raise ValueError(
      f'path={own!r}: an output of shape {jax.numpy.shape(y)} is no map of features.'
    )
  return y


class MapClassifier(Classifier):
  """Returns `head(map)` of the map of features that the backbone makes; children as in `Classifier`.

  Attributes:
    backbone: any network; what it does behind the map (pooling, a classifier) changes nothing.
    head: a module `map -> logits`, e.g. `CSRAMultiHead(80, num_heads=4, lam=0.5)`.
    map_path: of the module of the backbone whose output is the map; None: `feature_map_path`.
  """

  map_path: str | None = None

  def features(self, images: Array, train: bool = False) -> Array:
    """Returns the map `[batch, height, width, channels]` (`apply(..., method='features')`)."""
    return feature_map(self.backbone, images, train, path=self.map_path)
