"""DTL (Fu, Zhu & Wu, AAAI 2024, arXiv 2312.07856): a thin side network next to a frozen transformer.

Every block's input is mapped to the side state by a product of two thin matrices; from the middle of the
network on, the activated state is added to the blocks' outputs. Nothing is trained inside of the network, and
of blocks in front of the first addition only their input and a thin product are kept for the backward pass,
where they are read. DTL+ puts a depthwise convolution behind the activation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike

from jaxlab.adapters.pooling import mean_patch_hooks
from jaxlab.models.anatomy import anatomy
from jaxlab.models.convolution import conv_general_dilated
from jaxlab.models.initializers import torch_default
from jaxlab.models.intercept import Hook, Site, any_of, apply
from jaxlab.models.swin import Swin
from jaxlab.models.vit import ViT

Array = jax.Array
PyTree = Any


def swish(x: ArrayLike, beta: float = 100.0) -> Array:
  """Returns `x sigmoid(beta x)`, nearly a ReLU but smooth; taken in float32 or wider, in the dtype of `x`.

  >>> swish(jnp.array([-1.0, 0.0, 1.0])).tolist()
  [-0.0, 0.0, 1.0]
  """
  x = jnp.asarray(x)
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (wide * jax.nn.sigmoid(beta * wide)).astype(x.dtype)


def extract_side(state: ArrayLike, tokens: ArrayLike, down: ArrayLike, up: ArrayLike) -> Array:
  """Returns the side state with what a block's input adds, `state + (tokens down) up`.

  Args:
    state: like `tokens`, or the scalar 0.
    tokens: `[..., width]`.
    down: `[width, rank]`.
    up: `[rank, width]`.

  Raises:
    ValueError: for other shapes.
  """
  whole, thin, wide = jnp.shape(tokens), jnp.shape(down), jnp.shape(up)
  if len(thin) != 2 or thin[0] != whole[-1] or wide != thin[::-1]:
    raise ValueError(
      f'down is {thin}, up is {wide}: expected [width, rank] and [rank, width] with the width '
      f'{whole[-1]} of the tokens.'
    )
  if jnp.shape(state) not in ((), whole):
    raise ValueError(f'The state is {jnp.shape(state)}: expected that of tokens {whole}, or 0.')
  return state + (tokens @ down) @ up


def fuse_side(
  state: ArrayLike, kernel: ArrayLike, grid: Sequence[int], num_prefix_tokens: int
) -> Array:
  """Returns an activated state whose patch tokens went through a depthwise convolution, with zeros around.

  Args:
    state: `[batch, num_prefix_tokens + rows columns, width]`, or maps `[batch, rows, columns, width]`.
    kernel: `[k, k, 1, width]`; of even k, one more zero below and on the right.
    grid: rows and columns of the patches; of maps not read.
    num_prefix_tokens: tokens before the patches, which stay as they are.

  Raises:
    ValueError: if the tokens are not as many as prefix and grid, or the kernel is of another width.
  """
  state, kernel = jnp.asarray(state), jnp.asarray(kernel)
  maps = state.ndim == 4
  if kernel.ndim != 4 or kernel.shape[2:] != (1, state.shape[-1]):
    raise ValueError(
      f'The kernel is {kernel.shape}: expected [k, k, 1, width] for a state {state.shape}.'
    )
  if not maps and state.shape[1] != num_prefix_tokens + grid[0] * grid[1]:
    raise ValueError(
      f'{state.shape[1]} tokens are not {num_prefix_tokens} and a grid of {tuple(grid)} patches.'
    )
  x = state if maps else state[:, num_prefix_tokens:].reshape(len(state), *grid, -1)
  y = conv_general_dilated(
    x, kernel.astype(x.dtype), (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=x.shape[-1],
  )  # fmt: skip
  if maps:
    return y
  return jnp.concatenate([state[:, :num_prefix_tokens], y.reshape(len(y), -1, y.shape[-1])], 1)


def init_side_network(
  key: Array,
  widths: Mapping[str, int],
  rank: int,
  *,
  extracting: Sequence[str] | None = None,
  kernel_size: int | None = None,
) -> dict[str, PyTree]:
  """Draws a side network: the network next to it starts as it was.

  Args:
    key: typed.
    widths: channels of each block by its path, in order; see `block_widths`.
    rank: at least 1; 2 for ViT-B, 4 for Swin-B.
    extracting: paths of the blocks whose input is read; None: all.
    kernel_size: side of DTL+'s kernels, 3 to 5; None: DTL.

  Returns:
    `blocks`: for every extracting block `down` `[width, rank]`, uniform within +-1/sqrt(width), and `up`
    `[rank, width]`, zeros; with a kernel size `fusion`: for every stage (the path in front of its blocks'
    names, of a ViT 'blocks') a kernel `[k, k, 1, width]`, uniform within +-1/k.

  Raises:
    ValueError: for a rank or a kernel size below 1, or blocks that are none or unknown.
  """
  chosen = list(widths if extracting is None else extracting)
  if rank < 1 or (kernel_size is not None and kernel_size < 1):
    raise ValueError(f'rank={rank}, kernel_size={kernel_size}: expected at least 1.')
  if not chosen or any(path not in widths for path in chosen):
    raise ValueError(f'extracting={chosen}: expected some of the blocks {", ".join(widths)}.')
  key, *keys = jax.random.split(key, len(chosen) + 1)
  side: dict[str, PyTree] = {'blocks': {}}
  for path, own in zip(chosen, keys, strict=True):
    down = torch_default(own, (widths[path], rank), jnp.float32)
    side['blocks'][path] = {'down': down, 'up': jnp.zeros((rank, widths[path]), jnp.float32)}
  if kernel_size is not None:
    stages = {stage_of(path): width for path, width in widths.items()}
    draw = lambda own, width: jax.random.uniform(  # noqa: E731
      own, (kernel_size, kernel_size, 1, width), jnp.float32, -1 / kernel_size, 1 / kernel_size
    )
    own = jax.random.split(key, len(stages))
    side['fusion'] = {stage: draw(k, width) for k, (stage, width) in zip(own, stages.items())}
  return side


def stage_of(path: str) -> str:
  """Returns the stage of a block, by its path.

  >>> stage_of('blocks_3'), stage_of('layers_1/blocks_0')
  ('blocks', 'layers_1')
  """
  stage, _, name = path.rpartition('/')
  return stage or name.rpartition('_')[0]


def apply_side_network(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  side: Mapping[str, PyTree],
  images: Array,
  *,
  adding: Sequence[str],
  beta: float = 100.0,
  pool_patches: bool | None = None,
  **options: Any,
) -> Any:
  """Returns what a frozen transformer with a side network makes of images.

  At every block the state takes what the block's input adds (`extract_side`), then the block runs; behind
  those of `adding` the activated state (`swish`, in DTL+ then `fuse_side`) joins its output. A new stage
  begins with a state of zeros. No gradient flows through the tokens up to the first addition, so that of
  these blocks only what `extract_side` reads is kept; the state's gradients are whole. The network's
  parameters may be differentiated, too, from there on.

  Args:
    model: of `ViT` or `Swin`, without `remat` and `scan`.
    variables: of the model.
    side: see `init_side_network`.
    images: `[batch, height, width, channels]`.
    adding: paths of the blocks behind which the state is added; the paper takes the second half.
    beta: of the activation.
    pool_patches: whether the head sees the final norm of the mean patch token, as DTL has it of a ViT, in
      place of what the model pools; None: it does of a ViT, others pool as they do.
    **options: of the model's call, and of `apply`: `train`, `rngs`, `mutable`.

  Raises:
    ValueError: for another network than a ViT or a Swin, blocks that are none or unknown, an addition in
      front of the first extraction of its stage, arrays of `side` of other widths, `pool_patches` of a Swin,
      or a network whose blocks run under a transformation.
  """
  if not isinstance(model, ViT | Swin):
    raise ValueError(
      f'A side network stands next to a ViT or a Swin, whose blocks hand on tokens; got '
      f'{type(model).__name__}.'
    )
  parts = anatomy(model)
  order = {path: i for i, path in enumerate(parts.block_paths)}
  read, adding = side['blocks'], list(adding)
  _check_blocks(order, list(read), adding)
  first_addition = min(order[path] for path in adding)
  prefix, grid = 0, ()
  if isinstance(model, ViT):
    prefix = model.num_prefix_tokens
    grid = tuple(size // model.patch_size for size in images.shape[1:3])
  held: dict[str, Any] = {'stage': None, 'state': None, 'level': None}

  def begin(site: Site, x: Array) -> Array:
    held['level'] = site.module.scope.trace_level
    return x

  def call(site: Site, call: Any, x: Array, *args: Any, **kwargs: Any) -> Array:
    index, stage = order[site.path], stage_of(site.path)
    if site.module.scope.trace_level != held['level']:
      raise ValueError(
        f'{site.path!r} runs under a transformation of Linen (nn.remat, nn.scan), which the side state '
        'cannot leave: build the network with remat=False, scan=False.'
      )
    if held['stage'] != stage:
      held.update(stage=stage, state=jnp.zeros((), x.dtype))
    before = index <= first_addition
    x = jax.lax.stop_gradient(x) if before else x
    if site.path in read:
      down, up = (read[site.path][name].astype(x.dtype) for name in ('down', 'up'))
      held['state'] = _named(site.path, extract_side, held['state'], x, down, up)
    y = call(x, *args, **kwargs)
    y = jax.lax.stop_gradient(y) if before else y
    if site.path not in adding:
      return y
    added = swish(held['state'], beta)
    if 'fusion' in side:
      added = _named(f'fusion/{stage}', fuse_side, added, side['fusion'][stage], grid, prefix)
    return y + added

  hooks = [Hook('', input=begin), Hook(any_of(list(order)), call=call)]
  if pool_patches or (pool_patches is None and isinstance(model, ViT)):
    hooks += mean_patch_hooks(model)
  return apply(model, variables, images, hooks=hooks, **options)


def _named(path: str, function: Callable[..., Array], *arrays: Any) -> Array:
  """Returns what a function makes of arrays; its errors name the path that they are of."""
  try:
    return function(*arrays)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error


def _check_blocks(order: Mapping[str, int], read: Sequence[str], adding: Sequence[str]) -> None:
  if not read or not adding or any(path not in order for path in (*read, *adding)):
    raise ValueError(
      f'extracting={read}, adding={adding}: expected some of the blocks {", ".join(order)}.'
    )
  for path in adding:
    before = [own for own in read if stage_of(own) == stage_of(path) and order[own] <= order[path]]
    if not before:
      raise ValueError(
        f'adding={adding}: the state is 0 behind {path!r}, for no block of its stage up to there is among '
        f'extracting={read}.'
      )
