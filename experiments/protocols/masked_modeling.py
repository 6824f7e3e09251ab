"""Pretraining by masking: an encoder sees some patches of an image, a decoder predicts the others (MAE).

He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022 (https://arxiv.org/abs/2111.06377).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.harness import networks
from experiments.harness.runs import Run
from experiments.protocols import pretraining
from experiments.protocols.pretraining import Views
from jaxlab import evaluation, losses, models
from jaxlab.models import masked_autoencoder
from jaxlab.training import Initial, LossState, Out, cast_floating

Array = jax.Array
PyTree = Any

POSITIONS = 'encoder/backbone/pos_embed'  # a fixed code


@dataclasses.dataclass(frozen=True)
class Masking:
  """How much is hidden, what is predicted, and the decoder.

  Attributes:
    ratio: share of the patches that the encoder does not see.
    norm_pix_loss: standardizes each patch of the images that are predicted.
    width: of the decoder; likewise `depth` and `num_heads`.
  """

  ratio: float = 0.75
  norm_pix_loss: bool = True
  width: int = 512
  depth: int = 8
  num_heads: int = 16

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not 0 < self.ratio < 1:
      yield f'ratio={self.ratio}: expected a share between 0 and 1.'
    if self.depth < 1:
      yield f'depth={self.depth}: expected at least 1.'
    if self.num_heads < 1 or self.width % self.num_heads or self.width % 4:
      yield f'width={self.width}, num_heads={self.num_heads}: expected a multiple of 4 and of the heads.'


def parts(
  config: pretraining.Settings, own: Masking
) -> tuple[models.ViT, masked_autoencoder.MAEDecoder]:
  """Returns the encoder and the decoder.

  Raises:
    ValueError: if the backbone is no ViT whose class token alone, with a position of its own, stands before
      the patches, runs under `scan`, or sees images of another size; or if no patch would be seen.
  """
  vit, view = networks.create(config.model, num_classes=None), config.data.view
  name = config.model['name']
  if not isinstance(vit, models.ViT) or vit.num_prefix_tokens != 1 or not vit.embed_prefix:
    raise ValueError(
      f'MAE takes a ViT whose only token before the patches is the class; got {name!r}.'
    )
  if vit.scan:
    raise ValueError('MAE takes a ViT with scan=False: patches are dropped before the first block.')
  grid = tuple(side // vit.patch_size for side in view[:2])
  if grid != vit.grid:
    raise ValueError(
      f'MAE sees images of {view[0]} x {view[1]} pixels; the network is for another size.'
    )
  noise = jnp.zeros((1, grid[0] * grid[1]))
  jax.eval_shape(lambda: masked_autoencoder.random_masking(noise, own.ratio))
  sizes = {'width': own.width, 'depth': own.depth, 'num_heads': own.num_heads, 'dtype': vit.dtype}
  return vit, masked_autoencoder.MAEDecoder(vit.patch_size, vit.grid, view[-1], **sizes)


def training(
  config: pretraining.Settings,
  own: Masking,
  title: str,
  views: Callable[[Array, Array], Views],
  optimizer: Callable[[optax.Schedule], optax.GradientTransformation],
  decides: dict[str, Any],
) -> Run:
  """Returns the pretraining: pixels of hidden patches from the visible ones.

  The metric `z_std` is the spread of the mean of an image's visible tokens. What is predicted stays in
  float32: standardized patches of half precision would be rounding.

  Args:
    config: the settings.
    own: what is hidden.
    title: of the run.
    views: `(keys, images) -> [view]`, in one view of each image.
    optimizer: of the schedule; it leaves `POSITIONS` as they are.
    decides: what else decides what the run ends with.
  """
  vit, decoder = parts(config, own)
  count, dtype = vit.grid[0] * vit.grid[1], config.recipe.program_options['compute_dtype']
  drawn = ('drop_path',) * bool(vit.drop_path)

  def init(key: Array) -> Initial:
    encoder_key, decoder_key, key = jax.random.split(key, 3)
    encoder = dict(vit.init(encoder_key, jnp.zeros((1, *config.data.view)))['params'])
    encoder['pos_embed'] = masked_autoencoder.sincos_2d(vit.width, vit.grid, class_token=True)[None]
    tokens, places = jnp.zeros((1, count + 1, vit.width)), jnp.arange(count)[None]
    params = decoder.init(decoder_key, tokens, places)['params']
    names = ('views', 'mask', *drawn)
    streams = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    return Initial({'encoder': {'backbone': encoder}, 'decoder': params}, {}, {}, streams)

  def loss(
    params: PyTree, state: LossState, views: Views, keys: dict[str, Array]
  ) -> tuple[Array, Out]:
    (images,) = views
    noise = jax.random.uniform(keys['mask'], (len(images), count))
    keep, mask, restore = masked_autoencoder.random_masking(noise, own.ratio)
    tokens = masked_autoencoder.encode_visible(
      vit,
      {'params': params['encoder']['backbone']},
      cast_floating(images, dtype or images.dtype),
      keep,
      train=True,
      rngs={name: keys[name] for name in drawn},
    )
    pixels = decoder.apply({'params': params['decoder']}, tokens, restore)
    patches = masked_autoencoder.patchify(images, vit.patch_size)
    value = losses.mae_loss(pixels, patches, mask, normalize_patches=own.norm_pix_loss)
    z_std = evaluation.feature_std(jax.lax.stop_gradient(jnp.mean(tokens, 1)))
    return value, Out(metrics={'z_std': z_std})

  options = {'views': views, 'optimizer': optimizer, 'decides': decides}
  return pretraining.training(config, title, init, loss, cast_views=False, **options)
