"""Pyramid vision transformers, version 2 (Wang et al. 2022, arXiv 2106.13797).

Modules are named as in timm, `stages.1.blocks.0.mlp.fc1` as `stages_1/blocks_0/mlp/fc1` (and `attn` as
`attention`).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlab.models.activations import gelu
from jaxlab.models.attention import attention_scores, softmax, weighted_values
from jaxlab.models.initializers import kaiming_normal_fan_in, kaiming_normal_fan_out
from jaxlab.models.intercept import HookPoint
from jaxlab.models.normalization import LayerNorm
from jaxlab.models.resnet import check_images, square_conv
from jaxlab.models.transformer_layers import linear
from jaxlab.models.vit import draw_survival

Array = jax.Array

_conv = functools.partial(
  square_conv, use_bias=True, bias_init=nn.initializers.zeros, kernel_init=kaiming_normal_fan_out
)


class ReducedAttention(nn.Module):
  """Self-attention whose keys and values are those of a smaller map, `reduction` times less a side.

  The map is reduced by a convolution `sr` whose stride is its kernel size, and normalized. Hook points as in
  ViTs: `query`, `key`, `value`, `softmax`. `width` are the channels of queries, keys and values, all heads;
  None: as the input.
  """

  num_heads: int
  reduction: int = 1
  dtype: Any = None
  width: int | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[batch, height, width, channels]` to the same shape."""
    batch, height, width, channels = x.shape
    inner = self.width or channels
    heads = (self.num_heads, inner // self.num_heads)
    query = linear(inner, self.dtype, 'q')(x).reshape(batch, height * width, *heads)
    if self.reduction > 1:
      reduce = _conv(
        channels, self.reduction, self.reduction, padding='VALID', dtype=self.dtype, name='sr'
      )
      x = LayerNorm(1e-5, self.dtype, name='norm')(reduce(x))
    pairs = linear(2 * inner, self.dtype, 'kv')(x).reshape(batch, -1, 2, *heads)
    query, key, value = (
      HookPoint(name=name)(part)
      for name, part in (('query', query), ('key', pairs[:, :, 0]), ('value', pairs[:, :, 1]))
    )
    weights = softmax(attention_scores(query, key)).astype(value.dtype)
    weights = HookPoint(name='softmax')(weights)
    y = linear(channels, self.dtype, 'proj')(weighted_values(weights, value))
    return y.reshape(batch, height, width, channels)


class ConvMlp(nn.Module):
  """`fc2(gelu(dwconv(fc1(x))))` with a depthwise 3x3 convolution; hook point `gelu`, the exact one."""

  hidden: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[batch, height, width, channels]` to the same shape."""
    y = linear(self.hidden, self.dtype, 'fc1')(x)
    # Groups: as many as channels, so that the fan-out is the kernel's area.
    init = kaiming_normal_fan_in
    y = _conv(
      self.hidden, 3, groups=self.hidden, kernel_init=init, dtype=self.dtype, name='dwconv'
    )(y)
    y = HookPoint(name='gelu')(gelu(y))
    return linear(x.shape[-1], self.dtype, 'fc2')(y)


class Block(nn.Module):
  """A pre-norm block over maps; between attention and MLP lies the hook point `residual`.

  `width` is the attention's, `hidden` the MLP's channels, where they differ from what the others say; 0: the
  block has no such branch, and no norm in front of it.
  """

  num_heads: int
  mlp_ratio: float
  reduction: int
  dtype: Any = None
  width: int | None = None
  hidden: int | None = None

  @nn.compact
  def __call__(self, x: Array, survival: Array | None = None) -> Array:
    """Maps `[batch, height, width, channels]` to the same shape; `survival` `[2, batch]` as in ViTs."""

    def kept(y: Array, index: int) -> Array:
      return y if survival is None else y * survival[index][:, None, None, None].astype(y.dtype)

    norm = functools.partial(LayerNorm, 1e-6, self.dtype)
    if self.width != 0:
      own = ReducedAttention(
        self.num_heads, self.reduction, self.dtype, self.width, name='attention'
      )
      x = x + kept(own(norm(name='norm1')(x)), 0)
    x = HookPoint(name='residual')(x)
    hidden = int(x.shape[-1] * self.mlp_ratio) if self.hidden is None else self.hidden
    if not hidden:
      return x
    mlp = ConvMlp(hidden, self.dtype, name='mlp')
    return x + kept(mlp(norm(name='norm2')(x)), 1)


class PatchMerge(nn.Module):
  """A convolution over overlapping patches, and a norm."""

  features: int
  kernel_size: int = 3
  stride: int = 2
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[batch, height, width, channels]` to `[batch, height/stride, width/stride, features]`."""
    x = _conv(self.features, self.kernel_size, self.stride, dtype=self.dtype, name='proj')(x)
    return LayerNorm(1e-5, self.dtype, name='norm')(x)


class Stage(nn.Module):
  """Merging of patches (`downsample`, but in the first stage), blocks, and a norm."""

  features: int
  depth: int
  num_heads: int
  mlp_ratio: float
  reduction: int
  downsample: bool
  dtype: Any = None
  attention_widths: Sequence[int] | None = None
  hidden_widths: Sequence[int] | None = None

  @nn.compact
  def __call__(self, x: Array, survival: Array | None = None) -> Array:
    """Maps maps to maps; `survival` `[depth, 2, batch]`."""
    if self.downsample:
      x = PatchMerge(self.features, dtype=self.dtype, name='downsample')(x)
    for index in range(self.depth):
      own = None if survival is None else survival[index]
      options = self.num_heads, self.mlp_ratio, self.reduction, self.dtype
      widths = self.attention_widths and self.attention_widths[index]
      hidden = self.hidden_widths and self.hidden_widths[index]
      x = Block(*options, widths, hidden, name=f'blocks_{index}')(x, own)
    return LayerNorm(1e-6, self.dtype, name='norm')(x)


class PVT(nn.Module):
  """A pyramid transformer over float images `[batch, height, width, channels]` of any size.

  `patch_embed` (7x7, stride 4), stages `stages_i`, the mean over tokens (hook point `avgpool`), `head`.

  Attributes:
    widths: channels of each stage.
    depths: blocks of each stage.
    num_heads: attention heads of each stage, divisors of the channels.
    mlp_ratios: hidden channels of the MLPs over the channels.
    reductions: of keys and values, each side.
    num_classes: size of the classifier; None returns the pooled features.
    attention_widths: channels of each block's queries, keys and values, all heads, blocks of all stages in
      order; None: `widths`. With the next one what is left of a pruned network (`jaxlab.compression`).
    hidden_widths: hidden channels of each block's MLP; None: as `mlp_ratios` say.
    drop_path: as in `ViT`; needs the rng stream `drop_path`.
    dtype: of the computation (parameters stay float32); None: as the input.

  Raises:
    ValueError: at construction, if stages do not fit together; when called, for images of which a stage
      would have less than one reduced token.
  """

  widths: Sequence[int] = (32, 64, 160, 256)
  depths: Sequence[int] = (2, 2, 2, 2)
  num_heads: Sequence[int] = (1, 2, 5, 8)
  mlp_ratios: Sequence[float] = (8, 8, 4, 4)
  reductions: Sequence[int] = (8, 4, 2, 1)
  num_classes: int | None = None
  attention_widths: Sequence[int] | None = None
  hidden_widths: Sequence[int] | None = None
  drop_path: float = 0.0
  dtype: Any = None

  def __post_init__(self):
    fields = ('widths', 'depths', 'num_heads', 'mlp_ratios', 'reductions')
    if len({len(getattr(self, name)) for name in fields}) > 1:
      raise ValueError(f'PVT: {", ".join(fields)} have one entry a stage each.')
    for name in ('attention_widths', 'hidden_widths'):
      if (own := getattr(self, name)) is not None and len(own) != sum(self.depths):
        raise ValueError(f'PVT: {name} needs {sum(self.depths)} entries, got {own}.')
    divided = zip(self.widths, self.num_heads, strict=True)
    if not self.attention_widths and any(width % heads for width, heads in divided):
      raise ValueError(f'PVT: widths={self.widths} do not divide by num_heads={self.num_heads}.')
    if not 0 <= self.drop_path < 1:
      raise ValueError(f'PVT: drop_path={self.drop_path} is not in [0, 1).')
    if self.num_classes is not None and self.num_classes < 1:
      raise ValueError(f'PVT: num_classes={self.num_classes}; give None for pooled features.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns logits `[batch, num_classes]`, or features `[batch, channels]` without classifier."""
    check_images(x)
    sides = [(min(x.shape[1:3]) - 1) // 4 // 2**i + 1 for i in range(len(self.depths))]
    if any(side < own for side, own in zip(sides, self.reductions, strict=True)):
      raise ValueError(
        f'PVT: an image of {x.shape[1]} x {x.shape[2]} pixels is too small for reductions='
        f'{tuple(self.reductions)}.'
      )
    survival = None
    if train and self.drop_path:
      rates = np.linspace(0, self.drop_path, sum(self.depths))
      survival = draw_survival(self.make_rng('drop_path'), rates, x.shape[0])
    x = PatchMerge(self.widths[0], 7, 4, self.dtype, name='patch_embed')(x)
    done = 0
    for index, depth in enumerate(self.depths):
      inside = slice(done, done + depth)
      own = None if survival is None else survival[inside]
      stage = Stage(
        self.widths[index], depth, self.num_heads[index], self.mlp_ratios[index],
        self.reductions[index], index > 0, self.dtype,
        self.attention_widths and self.attention_widths[inside],
        self.hidden_widths and self.hidden_widths[inside],
        name=f'stages_{index}',
      )  # fmt: skip
      x, done = stage(x, own), done + depth
    x = HookPoint(name='avgpool')(jnp.mean(x, (1, 2)))
    return x if self.num_classes is None else linear(self.num_classes, self.dtype, 'head')(x)
