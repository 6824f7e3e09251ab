"""The parts of a network by module path: blocks, branches, normalizations, and all of them together."""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from flax import linen as nn

from jaxlab.models.intercept import module_paths

Paths = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Branch:
  """What a block adds to its shortcut, or does to its input where there is none.

  Attributes:
    kind: `'attention'`, `'mlp'`, `'conv'`, or `'merge'` (of patches).
    layers: its modules with a kernel, in order of execution.
    output: the module that returns the branch's result: what is added to the shortcut (in Swin's attention
      with its tokens still in windows).
  """

  kind: Literal['attention', 'mlp', 'conv', 'merge']
  layers: Paths
  output: str

  def __post_init__(self):
    _to_tuples(self, layers=str)


@dataclasses.dataclass(frozen=True)
class Block:
  """A module that runs between others of its kind.

  Attributes:
    path: of the module.
    branches: in order of execution; `()`: not told.
    shortcut: `'identity'`: the input is added as it is, so that the block can be dropped; `'projection'`:
      brought to another shape before; `'normalized'`: the input is added as it is, and the sum normalized
      (post-norm); `'none'`: there is no shortcut, or it is concatenated; None: not told.
    shortcut_layers: modules with a kernel on the shortcut.
    stacked: number of blocks whose variables are stacked under this path (`nn.scan`); None: one block.
    stream: modules whose outputs are the residual stream behind each addition, the block itself the last;
      `()`: not told.
  """

  path: str
  branches: tuple[Branch, ...] = ()
  shortcut: Literal['identity', 'projection', 'normalized', 'none'] | None = None
  shortcut_layers: Paths = ()
  stacked: int | None = None
  stream: Paths = ()

  def __post_init__(self):
    _to_tuples(self, branches=Branch, shortcut_layers=str, stream=str)

  @property
  def layers(self) -> Paths:
    """All modules with a kernel."""
    return (*(path for branch in self.branches for path in branch.layers), *self.shortcut_layers)


@dataclasses.dataclass(frozen=True)
class Norm:
  """A normalization and its neighbors.

  Attributes:
    path: of the module.
    layer: the layer whose output it normalizes, without anything between (a batch norm can be folded into
      it); None: something else.
    readers: the layers that read its output, if nothing but layers does (their kernels can absorb a scale of
      its channels); `()`: something else reads it.
    axis: of the layer's kernel that its outputs are: -1, or -2 of `ConvTranspose(transpose_kernel=True)`;
      None: not told. Not compared.
  """

  path: str
  layer: str | None = None
  readers: Paths = ()
  axis: int | None = dataclasses.field(default=None, compare=False)

  def __post_init__(self):
    _to_tuples(self, readers=str)


@dataclasses.dataclass(frozen=True)
class Anatomy:
  """The parts of a network, by module path.

  Attributes:
    stem: layers with a kernel before the first block.
    blocks: in order of execution; a path stands for `Block(path)`.
    features: the module whose output are the penultimate features, pooled, or one vector a token; the empty
      string: the model itself; None: its input.
    head: layers with a kernel that make logits (projections, predictions) of the features. A head that the
      library does not know is one layer here.
    embeddings: tables that are looked up before the first block.
    tied: the table that is the head's kernel, too.
    transitions: modules between blocks that change the resolution.
    neck: layers with a kernel between the last block and the features.
    norms: normalizations, in order of execution.
  """

  stem: Paths = ()
  blocks: tuple[Block, ...] = ()
  features: str | None = ''
  head: Paths = ()
  embeddings: Paths = ()
  tied: str | None = None
  transitions: tuple[Block, ...] = ()
  neck: Paths = ()
  norms: tuple[Norm, ...] = ()

  def __post_init__(self):
    paths = dict.fromkeys(('stem', 'head', 'embeddings', 'neck'), str)
    _to_tuples(self, blocks=Block, transitions=Block, norms=Norm, **paths)

  @property
  def edges(self) -> Paths:
    """First and last layers, which many methods keep at 8 bits: `stem` and `head`."""
    return (*self.stem, *self.head)

  @property
  def block_paths(self) -> Paths:
    """The paths of `blocks`."""
    return tuple(block.path for block in self.blocks)

  @property
  def stream(self) -> Paths:
    """The residual stream: the modules that hand it on behind each addition within the blocks."""
    return tuple(path for block in self.blocks for path in block.stream)

  @property
  def layers(self) -> Paths:
    """All modules with a kernel: of the stem, blocks, transitions, neck and head."""
    inside = (path for block in (*self.blocks, *self.transitions) for path in block.layers)
    return (*self.stem, *inside, *self.neck, *self.head)

  def below(self, prefix: str) -> 'Anatomy':
    """Returns the anatomy of the same network as the part `prefix` of a larger one.

    >>> Anatomy(stem=('conv1',), blocks=('layer1_0',)).below('backbone').edges
    ('backbone/conv1',)
    """
    return _moved(self, prefix)

  def check(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Raises ValueError for paths that name no module which `model(*args, **kwargs)` calls.

    Traces abstractly; arguments may be `jax.ShapeDtypeStruct`s.
    """
    known = module_paths(model, *args, **kwargs)
    unknown = sorted({path for path in _paths(self) if path and path not in known})
    if unknown:
      close = [name for path in unknown for name in difflib.get_close_matches(path, known, 1, 0.5)]
      hint = ', '.join(dict.fromkeys(close or known[:8]))
      raise ValueError(
        f'The anatomy names {", ".join(map(repr, unknown))}, which {type(model).__name__} does not call; '
        f'{"closest" if close else "some"} of its {len(known)} paths: {hint}.'
      )


def _to_tuples(part: Any, **kinds: type) -> None:
  """Makes tuples of the fields that hold sequences; a path stands for a part with that path.

  Raises:
    ValueError: for a field that is no sequence, or holds anything but its kind.
  """
  name = type(part).__name__
  for field, kind in kinds.items():
    value = getattr(part, field)
    if isinstance(value, str) or not isinstance(value, Iterable):
      raise ValueError(f'{name}: {field} is a sequence of paths; got {value!r}.')
    made = tuple(kind(own) if isinstance(own, str) and kind is not Branch else own for own in value)
    if wrong := [own for own in made if not isinstance(own, kind)]:
      expected = {str: 'paths', Branch: 'Branch'}.get(kind, f'paths or {kind.__name__}')
      raise ValueError(f'{name}: {field} holds {expected}; got {wrong[0]!r}.')
    object.__setattr__(part, field, made)


def _moved(part: Any, prefix: str) -> Any:
  """Returns a path, or all paths within a part, below `prefix`; kinds and numbers as they are."""
  if isinstance(part, str):
    return f'{prefix}/{part}' if part else prefix
  if isinstance(part, tuple):
    return tuple(_moved(own, prefix) for own in part)
  if dataclasses.is_dataclass(part):
    kept = ('kind', 'shortcut')
    own = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    moved = {name: v if name in kept else _moved(v, prefix) for name, v in own.items()}
    return type(part)(**moved)
  return part


def _paths(part: Any) -> Iterator[str]:
  """Yields every path within a part."""
  if isinstance(part, str):
    yield part
  elif isinstance(part, tuple):
    for own in part:
      yield from _paths(own)
  elif dataclasses.is_dataclass(part):
    for field in dataclasses.fields(part):
      if field.name not in ('kind', 'shortcut'):
        yield from _paths(getattr(part, field.name))


def merging(path: str) -> Block:
  """Returns the module between stages that halves the size by its layer `reduction`."""
  layer = f'{path}/reduction'
  return Block(path, (Branch('merge', (layer,), layer),), 'none')
