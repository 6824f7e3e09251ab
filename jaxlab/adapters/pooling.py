"""What the head of a vision transformer reads."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models.intercept import Hook, Site
from jaxlab.models.vit import ViT

Array = jax.Array


def mean_patch_hooks(model: nn.Module) -> tuple[Hook, ...]:
  """Returns hooks under which a ViT's final norm reads the mean of the patch tokens: pool, norm, head.

  The order of DTL (Fu, Zhu & Wu, AAAI 2024), whatever the model pools; of a class token nothing is read.

  Args:
    model: a `ViT`; hooks of its own, such as prompts, must have left the tokens that it knows.

  Raises:
    ValueError: for another network, or one with a distillation token, whose features are two; when called,
      for another number of tokens than that of its grid, unless it takes images of any size.
  """
  if not isinstance(model, ViT) or model.distilled:
    raise ValueError(
      f'Patch tokens are averaged in front of the norm of a ViT without distillation token; got '
      f'{type(model).__name__}.'
    )

  rows, columns = model.grid
  known = model.num_prefix_tokens + rows * columns

  def mean_first(site: Site, call: Any, x: Array) -> Array:
    del site
    if x.shape[1] != known and not model.dynamic_image_size:
      raise ValueError(
        f'{x.shape[1]} tokens reach the norm, but the model knows {known}: {model.num_prefix_tokens} and a '
        f'grid of {rows} x {columns}. Prompts are left out before they are averaged (keep=False).'
      )
    pooled = call(jnp.mean(x[:, model.num_prefix_tokens :], 1, keepdims=True))
    return jnp.broadcast_to(pooled, x.shape)

  return (Hook('norm', call=mean_first),)
