"""The library's ViT for a reference file's PyTorch parameters."""

import jax
import jax.numpy as jnp

from jaxlab.models import ViT, from_torch


def nhwc(images):
  """Returns reference images, NCHW, as ours."""
  return jnp.asarray(images.transpose(0, 2, 3, 1))


def vit_of(state_dict, num_heads, images):
  """Returns the ViT and its float64 variables for a state dict in timm's names."""
  width = state_dict['cls_token'].shape[-1]
  model = ViT(
    patch_size=state_dict['patch_embed.proj.weight'].shape[-1],
    image_size=images.shape[1:3],
    width=width,
    depth=len({name.split('.')[1] for name in state_dict if name.startswith('blocks.')}),
    num_heads=num_heads,
    mlp_ratio=len(state_dict['blocks.0.mlp.fc1.bias']) / width,
    num_classes=len(state_dict['head.bias']),
  )
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float64), shapes)
  return model, from_torch(shapes, state_dict)
