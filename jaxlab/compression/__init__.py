"""Making a trained network small: which channels stay, by scores of all of them."""

from jaxlab.compression.dense import (
  BlockMacs,
  DenseStructure,
  block_macs,
  dense_structure,
  kept_hidden,
  kept_neurons,
  vit_macs,
)
from jaxlab.compression.ranking import global_ranking
from jaxlab.compression.selection import highest_channels, highest_channels_by_head
from jaxlab.compression.synthetic_images import (
  distinct_labels,
  require_recognized,
  synthesize,
  variation,
)

__all__ = [
  'BlockMacs',
  'DenseStructure',
  'block_macs',
  'dense_structure',
  'distinct_labels',
  'global_ranking',
  'highest_channels',
  'highest_channels_by_head',
  'kept_hidden',
  'kept_neurons',
  'require_recognized',
  'synthesize',
  'variation',
  'vit_macs',
]
