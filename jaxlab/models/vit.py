"""Vision transformers: ViT (Dosovitskiy et al. 2021), DeiT (Touvron et al. 2021), and what followed.

DeiT-III (Touvron et al. 2022), DINOv2 (Oquab et al. 2024) and the image towers of CLIP (Radford et al. 2021)
differ in a few options.

Modules are named as in timm, `blocks.3.mlp.fc1` as `blocks_3/mlp/fc1` (and `attn` as `attention`).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlab.models.activations import GELUS
from jaxlab.models.attention import attention_scores, softmax, weighted_values
from jaxlab.models.convolution import conv_general_dilated
from jaxlab.models.initializers import torch_default, torch_default_bias, vit_normal
from jaxlab.models.intercept import HookPoint
from jaxlab.models.normalization import LayerNorm
from jaxlab.models.position_embedding import resample_position_embedding
from jaxlab.models.resnet import check_images
from jaxlab.models.transformer_layers import LayerScale, Mlp, SwiGLU, linear

Array = jax.Array
PyTree = Any


class Attention(nn.Module):
  """Multi-head self-attention, `softmax(q k^T / sqrt(head width)) v`, with one projection `qkv`.

  Hook points: `query`, `key`, `value` `[batch, tokens, heads, head width]` as projected, and `softmax`
  `[batch, heads, queries, keys]`. The softmax is taken in at least float32.

  Attributes:
    num_heads: attention heads.
    qkv_bias: whether `qkv` has a bias.
    dtype: of the computation.
    channels: of queries, keys and values, all heads; None: as the input.
  """

  num_heads: int
  qkv_bias: bool = True
  dtype: Any = None
  channels: int | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[batch, tokens, width]` to the same shape."""
    batch, tokens, width = x.shape
    channels = self.channels or width
    qkv = linear(3 * channels, self.dtype, 'qkv', self.qkv_bias)(x)
    qkv = qkv.reshape(batch, tokens, 3, self.num_heads, channels // self.num_heads)
    query, key, value = (
      HookPoint(name=name)(part[:, :, 0])
      for name, part in zip(('query', 'key', 'value'), jnp.split(qkv, 3, axis=2), strict=True)
    )
    weights = softmax(attention_scores(query, key)).astype(value.dtype)
    weights = HookPoint(name='softmax')(weights)
    return linear(width, self.dtype, 'proj')(weighted_values(weights, value))


class Block(nn.Module):
  """A pre-norm transformer block: attention, then MLP, each around a shortcut.

  Between them lies the hook point `residual`.

  Attributes:
    num_heads: attention heads.
    mlp_ratio: hidden channels of the MLP over the width.
    qkv_bias: whether the projection `qkv` has a bias.
    dtype: of the computation.
    activation: of the MLP: a name of `GELUS`, or `'swiglu'`.
    layer_scale: initial factor of `ls1` and `ls2` behind the branches; None: there are none.
    epsilon: of the LayerNorms.
    channels: of the attention, see there; 0: the block has no attention, and no `norm1`.
    hidden: channels of the MLP, where they differ from what `mlp_ratio` says; 0: no MLP, and no `norm2`.
  """

  num_heads: int
  mlp_ratio: float = 4.0
  qkv_bias: bool = True
  dtype: Any = None
  activation: str = 'gelu'
  layer_scale: float | None = None
  epsilon: float = 1e-6
  channels: int | None = None
  hidden: int | None = None

  @nn.compact
  def __call__(self, x: Array, survival: Array | None = None) -> Array:
    """Maps `[batch, tokens, width]` to the same shape.

    `survival` `[2, batch]` multiplies the two branches of each example (drop path): 0 or 1 / keep rate.
    """

    def branch(layers: nn.Module, x: Array, index: int) -> Array:
      y = layers(LayerNorm(self.epsilon, self.dtype, name=f'norm{index + 1}')(x))
      if self.layer_scale is not None:
        y = LayerScale(self.layer_scale, self.dtype, name=f'ls{index + 1}')(y)
      return y if survival is None else y * survival[index][:, None, None].astype(y.dtype)

    if self.channels != 0:
      attention = Attention(
        self.num_heads, self.qkv_bias, self.dtype, self.channels, name='attention'
      )
      x = x + branch(attention, x, 0)
    x = HookPoint(name='residual')(x)
    hidden = int(x.shape[-1] * self.mlp_ratio) if self.hidden is None else self.hidden
    if not hidden:
      return x
    if self.activation == 'swiglu':
      mlp = SwiGLU(hidden, self.dtype, name='mlp')
    else:
      mlp = Mlp(hidden, self.dtype, self.activation, name='mlp')
    return x + branch(mlp, x, 1)


class PatchEmbed(nn.Module):
  """Cuts images into patches and projects each: a convolution whose stride is its kernel size."""

  patch_size: int
  width: int
  dtype: Any = None
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[batch, height, width, channels]` to `[batch, rows, columns, embedding]`."""
    patch = (self.patch_size, self.patch_size)
    bias_init = torch_default_bias(self.patch_size**2 * x.shape[-1])
    return nn.Conv(
      self.width,
      patch,
      strides=patch,
      padding='VALID',
      use_bias=self.use_bias,
      kernel_init=torch_default,
      bias_init=bias_init,
      conv_general_dilated=conv_general_dilated,
      dtype=self.dtype,
      name='proj',
    )(x)


class ViT(nn.Module):
  """A vision transformer over float images `[batch, height, width, channels]`.

  Patches in raster order behind the class token (the distillation token, registers), plus `pos_embed`;
  `norm_pre`, if wanted; `blocks_i`; `norm`; pooling `pool`; `head`. With `distilled` a second classifier
  `head_dist` reads the distillation token (`pool` is the pair of both tokens): in training both logits are
  returned as a pair, otherwise their mean.

  Attributes:
    patch_size: side of a patch in pixels.
    image_size: side, or (height, width), for which `pos_embed` is stored.
    width: channels of a token.
    depth: number of blocks.
    num_heads: attention heads, a divisor of `width`.
    mlp_ratio: hidden channels of the MLP over `width`.
    num_classes: size of the classifier(s); None returns the pooled features `[batch, width]`.
    distilled: whether there are a distillation token and its classifier.
    pooling: `'token'` (the class token; with `distilled` the mean of the two tokens' features, if there is
      no classifier) or `'mean'` (of the normalized patch tokens).
    drop_path: chance that a branch of the last block is dropped for an example in training; falls linearly
      to 0 at the first block. Needs the rng stream `drop_path`.
    qkv_bias: whether the projection `qkv` has a bias.
    activation: of the MLPs: `'gelu'` (exact), `'gelu_tanh'`, `'quick_gelu'` (CLIP's), or `'swiglu'`, whose
      two halves share the hidden channels.
    layer_scale: initial factor of the `LayerScale`s behind all branches; None: there are none.
    registers: number of further tokens without a meaning, `reg_token` (Darcet et al. 2024, arXiv 2309.16588).
    embed_prefix: whether `pos_embed` has rows for the tokens before the patches, too.
    pre_norm: whether there is a `norm_pre` before the blocks; then patches are projected without bias (CLIP).
    epsilon: of the LayerNorms.
    attention_widths: channels of each block's queries, keys and values, all heads; None: `width`. With the
      next two what is left of a pruned network (`jaxlab.compression`); 0: the block has no attention, and no
      `norm1`.
    attention_heads: attention heads of each block; None: `num_heads`.
    hidden_widths: hidden channels of each block's MLP; None: as `mlp_ratio` says; 0: no MLP, and no `norm2`.
    dynamic_image_size: accept images of any size divisible by the patch, resampling `pos_embed`
      (`resample_position_embedding`).
    dtype: of the computation (parameters stay float32); None: as the input.
    remat: recompute each block's activations in the backward pass instead of storing them.
    scan: one compiled block under `nn.scan`, with its parameters stacked under `blocks` (`stack_blocks`).

  Raises:
    ValueError: at construction, if `image_size` is not divisible by the patch or `width` by the heads; when
      called, if the images have another size.
  """

  patch_size: int = 16
  image_size: int | tuple[int, int] = 224
  width: int = 192
  depth: int = 12
  num_heads: int = 3
  mlp_ratio: float = 4.0
  num_classes: int | None = None
  distilled: bool = False
  pooling: str = 'token'
  drop_path: float = 0.0
  qkv_bias: bool = True
  activation: str = 'gelu'
  layer_scale: float | None = None
  registers: int = 0
  embed_prefix: bool = True
  pre_norm: bool = False
  epsilon: float = 1e-6
  attention_widths: Sequence[int] | None = None
  attention_heads: Sequence[int] | None = None
  hidden_widths: Sequence[int] | None = None
  dynamic_image_size: bool = False
  dtype: Any = None
  remat: bool = False
  scan: bool = False

  def __post_init__(self):
    self._grid_of(*self._image_hw)
    if not self.attention_widths and self.width % self.num_heads:
      raise ValueError(f'ViT: width={self.width} is not divisible by num_heads={self.num_heads}.')
    self._check_pruned()
    if self.pooling not in ('token', 'mean') or (self.distilled and self.pooling == 'mean'):
      raise ValueError(
        f"ViT: pooling={self.pooling!r}; choose 'token' or 'mean' (distilled: 'token' only)."
      )
    if self.activation not in (*GELUS, 'swiglu'):
      raise ValueError(f'ViT: activation={self.activation!r} is none of {(*GELUS, "swiglu")}.')
    if self.registers < 0:
      raise ValueError(f'ViT: registers={self.registers} is negative.')
    if not 0 <= self.drop_path < 1:
      raise ValueError(f'ViT: drop_path={self.drop_path} is not in [0, 1).')
    if self.num_classes is not None and self.num_classes < 1:
      raise ValueError(f'ViT: num_classes={self.num_classes}; give None for pooled features.')
    super().__post_init__()

  def _check_pruned(self) -> None:
    """Raises ValueError if widths of single blocks do not fit together."""
    for name in ('attention_widths', 'attention_heads', 'hidden_widths'):
      own = getattr(self, name)
      if own is not None and (len(own) != self.depth or min(own, default=0) < 0):
        raise ValueError(f'ViT: {name}={own}: expected {self.depth} numbers of at least 0.')
      if own is not None and self.scan and len(set(own)) > 1:
        raise ValueError(f'ViT: scan=True needs blocks of one shape, got {name}={own}.')
    heads = self.attention_heads or (self.num_heads,) * self.depth
    if any(width % max(own, 1) for width, own in zip(self.attention_widths or (), heads)):
      raise ValueError(f'ViT: attention_widths={self.attention_widths} do not divide by {heads}.')

  @property
  def _image_hw(self) -> tuple[int, int]:
    size = self.image_size
    return (size, size) if isinstance(size, int) else tuple(size)

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of patches for which `pos_embed` is stored."""
    return self._grid_of(*self._image_hw)

  @property
  def num_prefix_tokens(self) -> int:
    """Number of tokens before the patches."""
    return 1 + self.distilled + self.registers

  @property
  def num_embedded_prefix_tokens(self) -> int:
    """Number of rows of `pos_embed` before those of the patches."""
    return self.num_prefix_tokens if self.embed_prefix else 0

  def _grid_of(self, height: int, width: int) -> tuple[int, int]:
    if height % self.patch_size or width % self.patch_size or min(height, width) < 1:
      raise ValueError(
        f'ViT: an image of {height} x {width} pixels does not divide into patches of '
        f'patch_size={self.patch_size}; resize the image or change the patch.'
      )
    return height // self.patch_size, width // self.patch_size

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array | tuple[Array, Array]:
    """Returns logits `[batch, num_classes]`, or features `[batch, width]` without classifier."""
    check_images(x)
    batch, height, width, _ = x.shape
    grid = self._grid_of(height, width)
    if grid != self.grid and not self.dynamic_image_size:
      raise ValueError(
        f'ViT for images of {self._image_hw} got {(height, width)}: give image_size={(height, width)} '
        f'(and resample a checkpoint), or dynamic_image_size=True.'
      )
    embed = PatchEmbed(
      self.patch_size, self.width, self.dtype, use_bias=not self.pre_norm, name='patch_embed'
    )
    x = embed(x).reshape(batch, grid[0] * grid[1], self.width)
    if self.embed_prefix:
      x = self._add_position(self._add_prefix(x), grid)
    else:
      x = self._add_prefix(self._add_position(x, grid))
    if self.pre_norm:
      x = LayerNorm(self.epsilon, self.dtype, name='norm_pre')(x)
    x = self._run_blocks(x, train)
    x = LayerNorm(self.epsilon, self.dtype, name='norm')(x)

    if self.distilled:
      pooled = x[:, 0], x[:, 1]
    else:
      pooled = x[:, 0] if self.pooling == 'token' else jnp.mean(x[:, self.num_prefix_tokens :], 1)
    pooled = HookPoint(name='pool')(pooled)
    pooled = pooled if self.distilled else (pooled,)
    if self.num_classes is None:
      return sum(pooled) / len(pooled)
    heads = ('head', 'head_dist')[: len(pooled)]
    logits = tuple(linear(self.num_classes, self.dtype, h)(p) for h, p in zip(heads, pooled))
    return logits if self.distilled and train else sum(logits) / len(logits)

  def _add_prefix(self, x: Array) -> Array:
    shape = (1, 1, self.width)
    tokens = [self.param('cls_token', nn.initializers.normal(1e-6), shape, jnp.float32)]
    if self.distilled:
      tokens.append(self.param('dist_token', vit_normal, shape, jnp.float32))
    if self.registers:
      shape = (1, self.registers, self.width)
      tokens.append(self.param('reg_token', nn.initializers.normal(1e-6), shape, jnp.float32))
    tokens = [jnp.broadcast_to(t.astype(x.dtype), (x.shape[0], *t.shape[1:])) for t in tokens]
    return jnp.concatenate([*tokens, x], axis=1)

  def _add_position(self, x: Array, grid: tuple[int, int]) -> Array:
    prefix = self.num_embedded_prefix_tokens
    num_tokens = prefix + self.grid[0] * self.grid[1]
    pos_embed = self.param('pos_embed', vit_normal, (1, num_tokens, self.width), jnp.float32)
    pos_embed = resample_position_embedding(
      pos_embed, grid, num_prefix_tokens=prefix, old_grid=self.grid
    )
    return x + pos_embed.astype(x.dtype)

  def _run_blocks(self, x: Array, train: bool) -> Array:
    survival = None
    if train and self.drop_path:
      # Drawn for all blocks at once, so that `scan` and `remat` drop the same branches.
      rates = np.linspace(0, self.drop_path, self.depth)
      survival = draw_survival(self.make_rng('drop_path'), rates, x.shape[0])
    block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
    options = {
      'mlp_ratio': self.mlp_ratio,
      'qkv_bias': self.qkv_bias,
      'dtype': self.dtype,
      'activation': self.activation,
      'layer_scale': self.layer_scale,
      'epsilon': self.epsilon,
    }

    def of_block(index: int) -> dict[str, Any]:
      return options | {
        'num_heads': self.attention_heads[index] if self.attention_heads else self.num_heads,
        'channels': self.attention_widths and self.attention_widths[index],
        'hidden': self.hidden_widths and self.hidden_widths[index],
      }

    if not self.scan:
      for index in range(self.depth):
        own = None if survival is None else survival[index]
        x = block(**of_block(index), name=f'blocks_{index}')(x, own)
      return x
    run = nn.scan(
      lambda module, carry, own: (module(carry, own), None),
      variable_axes={True: 0},
      split_rngs={'params': True},
      length=self.depth,
    )
    return run(block(**of_block(0), name='blocks'), x, survival)[0]


def draw_survival(key: Array, rates: np.ndarray, batch: int) -> Array:
  """Returns drop path's factors `[depth, 2, batch]`: 0 with chance `rates[i]`, else 1 / (1 - rate).

  One independent draw for each block, branch (attention, MLP) and example, as timm's `DropPath`.
  """
  keep = jnp.asarray(1 - np.asarray(rates), jnp.float32)[:, None, None]
  return jax.random.bernoulli(key, keep, (len(rates), 2, batch)) / keep


def stack_blocks(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """Returns `params` with the subtrees `blocks_0, blocks_1, ...` as one, `blocks`, of stacked arrays.

  From the layout of a plain `ViT` to that of `ViT(scan=True)`; for any collection with blocks at its top.

  Raises:
    ValueError: if there are no blocks, or not `blocks_0` to `blocks_{n-1}`.
  """
  names = [name for name in params if re.fullmatch(r'blocks_\d+', name)]
  expected = [f'blocks_{index}' for index in range(len(names))]
  if not names or set(names) != set(expected):
    raise ValueError(f'stack_blocks needs blocks_0, blocks_1, ...; got {sorted(params)}.')
  rest = {name: value for name, value in params.items() if name not in names}
  stacked = jax.tree.map(_stack, *(params[name] for name in expected))
  return {**rest, 'blocks': stacked}


def unstack_blocks(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """Inverse of `stack_blocks`: from the layout of `ViT(scan=True)` to that of a plain `ViT`."""
  if 'blocks' not in params:
    raise ValueError(f"unstack_blocks needs a subtree 'blocks'; got {sorted(params)}.")
  rest = {name: value for name, value in params.items() if name != 'blocks'}
  depth = len(jax.tree.leaves(params['blocks'])[0])
  for index in range(depth):
    rest[f'blocks_{index}'] = jax.tree.map(lambda leaf, i=index: leaf[i], params['blocks'])
  return rest


def _stack(*leaves):
  """Stacks along a new first axis; NumPy arrays stay NumPy arrays, and keep their dtype."""
  return (np if isinstance(leaves[0], np.ndarray) else jnp).stack(leaves)
