"""What can be cut out of a network: groups of channels that shrink together, and parts that can be left out.

`structure(model)` tells it from a network's fields alone. A group is a set of channels that one number of
channels stands for: those of a convolution and of the norm behind it, or a residual trunk with all layers
that write to it and read from it. So whatever is taken out of a group, the network stays whole.
"""

import dataclasses
import functools
from collections.abc import Mapping

from flax import linen as nn

from jaxlab.models.intercept import check_linen


@dataclasses.dataclass(frozen=True)
class Cut:
  """An axis of an array that a group's channels lie along.

  Attributes:
    path: of the array within the variables, `params/layer1_0/conv1/kernel`. Arrays that a network does not
      have (a convolution without bias) are passed over.
    axis: from the end, so that kernels of any rank have their inputs at -2 and their outputs at -1.
    parts: times the group's channels lie side by side on the axis: 3 where one kernel makes query, key and
      value.
  """

  path: str
  axis: int = -1
  parts: int = 1


@dataclasses.dataclass(frozen=True)
class Group:
  """Channels that shrink together.

  Attributes:
    size: number of channels.
    cuts: where they lie.
    norms: paths of the layer normalizations over them, whose moments are those of the channels that stay.
    heads: equal, consecutive parts of the channels that belong together, an attention's heads: of those that
      stay, each has as many channels.
    scaled: paths of kernels (and biases) and their parts that a change of the head width must scale, so that
      attention's scores stay: `(path, index of the part, parts)`.
  """

  size: int
  cuts: tuple[Cut, ...]
  norms: tuple[str, ...] = ()
  heads: int = 1
  scaled: tuple[tuple[str, int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Structure:
  """What can be cut out of a network.

  Attributes:
    groups: by name: the path of what makes the channels (`layer1_0/conv1`), of a stage whose trunk they are
      (`layer1`), or `neck`, a transformer's embedding.
    parts: paths of the modules that can be left out: blocks around an identity, and branches of transformers.
    stages: paths of all blocks of each stage, of which one has to stay.
  """

  groups: Mapping[str, Group]
  parts: tuple[str, ...] = ()
  stages: tuple[tuple[str, ...], ...] = ()

  @property
  def sizes(self) -> dict[str, int]:
    """Channels of each group."""
    return {name: group.size for name, group in self.groups.items()}


def structure(model: nn.Module) -> Structure:
  """Returns what can be cut out of a network of this library.

  Knows `ResNet` (trunks of stages and inner channels of blocks; with `shortcut='pad'` or groups of
  convolutions no trunks or inner channels), `MobileNetV2` without squeeze-and-excitation, `VGG` (not its two
  hidden layers), `ViT` without `scan`, and `PVT`. Nothing is traced.

  Raises:
    ValueError: for another network.

  >>> from jaxlab.models import create
  >>> found = structure(create('resnet18'))
  >>> found.groups['layer2'].size, found.groups['layer2_0/conv1'].size, found.parts[:3]
  (128, 128, ('layer1_0', 'layer1_1', 'layer2_1'))
  """
  check_linen(model)
  return describe(model)


@functools.singledispatch
def describe(model: nn.Module) -> Structure:
  """Returns the structure of a network of a registered class."""
  known = ', '.join(kind.__name__ for kind in describe.registry if kind is not object)
  raise ValueError(
    f'What can be cut out of {type(model).__name__} is not known (known are {known}). Register a function '
    f'that returns its Structure: compression.describe.register.'
  )


@functools.singledispatch
def shrunk(model: nn.Module, sizes: Mapping[str, int], heads: Mapping[str, int], gone: set[str]):
  """Returns the network with groups of these sizes and heads, without the parts that are gone.

  Called by `slice_network`, which has checked the arguments. `sizes` and `heads` are those of all groups of
  the whole network.
  """
  raise ValueError(f'{type(model).__name__} has no smaller form: register compression.shrunk.')


def made_by(path: str, norm: str | None = None) -> tuple[Cut, ...]:
  """Returns the cuts along a layer's outputs, and of the batch norm or layer norm behind it."""
  cuts = (Cut(f'params/{path}/kernel'), Cut(f'params/{path}/bias'))
  return cuts if norm is None else (*cuts, *of_norm(norm))


def of_norm(path: str) -> tuple[Cut, ...]:
  """Returns the cuts of a normalization, statistics included."""
  params = [Cut(f'params/{path}/{name}') for name in ('scale', 'bias')]
  return (*params, *(Cut(f'batch_stats/{path}/{name}') for name in ('mean', 'var')))


def read_by(*paths: str) -> tuple[Cut, ...]:
  """Returns the cuts along the inputs of layers."""
  return tuple(Cut(f'params/{path}/kernel', -2) for path in paths)
