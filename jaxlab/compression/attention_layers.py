"""Where decoders have their attention, and how its layers hold heads: one form for all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn

from jaxlab.models import GPT2, Bloom, Llama
from jaxlab.trees import on_host

PyTree = Any


class Layer(NamedTuple):
  """A linear layer, `x @ kernel + bias`; None: without bias."""

  kernel: np.ndarray
  bias: np.ndarray | None = None


class AttentionLayers(NamedTuple):
  """The four layers of an attention, heads side by side in the outputs (of `output` in the inputs)."""

  query: Layer
  key: Layer
  value: Layer
  output: Layer


class AttentionLayout(NamedTuple):
  """Where a decoder has its attention, and how its layers hold heads.

  Attributes:
    paths: of the attention modules, in order.
    num_heads: of queries; head h reads head `h // (num_heads / num_kv_heads)` of keys and values.
    num_kv_heads: that are cached.
    head_width: channels of a head.
    rotary: queries and keys are rotated between their layers and the scores.
    unrotated_key: name of the layer in the module whose output are the keys before that; None: without
      rotation.
    read: parameters of an attention module -> its layers.
    write: layers -> parameters of a module of `grouped(...)`.
    grouped: `(num_kv_heads=..., ...)` -> the decoder with other heads of keys and values.
  """

  paths: tuple[str, ...]
  num_heads: int
  num_kv_heads: int
  head_width: int
  rotary: bool
  unrotated_key: str | None
  read: Callable[[Mapping[str, PyTree]], AttentionLayers]
  write: Callable[[AttentionLayers], dict[str, PyTree]]
  grouped: Callable[..., nn.Module]


def require_groups(layout: AttentionLayout, group_size: int) -> None:
  """Raises ValueError unless the heads of keys and values divide into groups."""
  if group_size < 1 or layout.num_kv_heads % group_size:
    raise ValueError(
      f'group_size={group_size} does not divide the {layout.num_kv_heads} heads of keys and values.'
    )


def read_layers(
  layout: AttentionLayout, variables: Mapping[str, PyTree]
) -> dict[str, AttentionLayers]:
  """Returns the layers of every attention of a decoder, by its path."""

  def params(path: str) -> PyTree:
    tree = variables['params']
    for name in path.split('/'):
      tree = tree[name]
    return tree

  return {path: layout.read(params(path)) for path in layout.paths}


@functools.singledispatch
def attention_layout(model: nn.Module) -> AttentionLayout:
  """Returns the layout of a `Llama` (Qwen2 is one), `Bloom` or `GPT2`.

  Raises:
    ValueError: for any other model, and for a `Llama` whose keys hooks make fewer already.
  """
  raise ValueError(
    f'The heads of {type(model).__name__} are not known; known are those of Llama, Bloom and GPT2.'
  )


@attention_layout.register
def _llama(model: Llama) -> AttentionLayout:
  if model.num_key_heads is not None or not model.cache_rotated:
    raise ValueError(
      'this Llama has grouped its keys already (num_key_heads, cache_rotated): group the heads of the '
      'original.'
    )
  names = ('q_proj', 'k_proj', 'v_proj', 'o_proj')
  return AttentionLayout(
    paths=tuple(f'layers_{index}/self_attn' for index in range(model.depth)),
    num_heads=model.num_heads,
    num_kv_heads=model.num_kv_heads or model.num_heads,
    head_width=model.head_width or model.width // model.num_heads,
    rotary=True,
    unrotated_key='k_proj',
    read=lambda params: AttentionLayers(*(_layer(params[name]) for name in names)),
    write=lambda layers: {name: _params(own) for name, own in zip(names, layers, strict=True)},
    grouped=model.clone,
  )


@attention_layout.register
def _bloom(model: Bloom) -> AttentionLayout:
  kv_heads, width = model.num_kv_heads or model.num_heads, model.width // model.num_heads

  def read(params: Mapping[str, PyTree]) -> AttentionLayers:
    def split(fused: np.ndarray) -> list[np.ndarray]:
      by_head = fused.reshape(*fused.shape[:-1], kv_heads, -1, width)
      parts = by_head[..., :-2, :], by_head[..., -2, :], by_head[..., -1, :]
      return [part.reshape(*fused.shape[:-1], -1) for part in parts]

    fused = _layer(params['query_key_value'])
    parts = map(Layer, split(fused.kernel), split(fused.bias))
    return AttentionLayers(*parts, _layer(params['dense']))

  def write(layers: AttentionLayers) -> dict[str, PyTree]:
    def fuse(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
      lead, groups = key.shape[:-1], key.shape[-1] // width
      parts = [part.reshape(*lead, groups, -1, width) for part in (query, key, value)]
      return np.concatenate(parts, axis=-2).reshape(*lead, -1)

    inputs = layers[:3]
    kernel, bias = fuse(*(own.kernel for own in inputs)), fuse(*(own.bias for own in inputs))
    return {'query_key_value': _params(Layer(kernel, bias)), 'dense': _params(layers.output)}

  return _unrotated(model, 'self_attention', read, write)


@attention_layout.register
def _gpt2(model: GPT2) -> AttentionLayout:
  kv_heads, width = model.num_kv_heads or model.num_heads, model.width // model.num_heads

  def read(params: Mapping[str, PyTree]) -> AttentionLayers:
    fused, ends = _layer(params['c_attn']), (model.width, model.width + kv_heads * width)
    parts = map(Layer, *(np.split(own, ends, axis=-1) for own in fused))
    return AttentionLayers(*parts, _layer(params['c_proj']))

  def write(layers: AttentionLayers) -> dict[str, PyTree]:
    parts = zip(*layers[:3], strict=True)
    fused = Layer(*(np.concatenate(part, axis=-1) for part in parts))
    return {'c_attn': _params(fused), 'c_proj': _params(layers.output)}

  return _unrotated(model, 'attn', read, write)


def _unrotated(
  model: Bloom | GPT2,
  name: str,
  read: Callable[[Mapping[str, PyTree]], AttentionLayers],
  write: Callable[[AttentionLayers], dict[str, PyTree]],
) -> AttentionLayout:
  return AttentionLayout(
    paths=tuple(f'h_{index}/{name}' for index in range(model.depth)),
    num_heads=model.num_heads,
    num_kv_heads=model.num_kv_heads or model.num_heads,
    head_width=model.width // model.num_heads,
    rotary=False,
    unrotated_key=None,
    read=read,
    write=write,
    grouped=model.clone,
  )


def _layer(params: Mapping[str, PyTree]) -> Layer:
  own = on_host(dict(params))
  return Layer(own['kernel'], own.get('bias'))


def _params(layer: Layer) -> dict[str, np.ndarray]:
  bias = {} if layer.bias is None else {'bias': layer.bias}
  return {'kernel': layer.kernel, **bias}
