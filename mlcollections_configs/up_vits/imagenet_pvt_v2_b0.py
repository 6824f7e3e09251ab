"""UP-PVTv2-B0: PVTv2-B2 cut to the shape of B0; else as `imagenet_deit_tiny`.

  python -m experiments.up_vits --config=imagenet_pvt_v2_b0 --workdir=gs://...

The code of this part is not public (inferred): each stage has an embedding of its own, whose channels are
scored and cut as a ViT's; of its 3, 4, 6 and 3 blocks the two of the highest scores stay. The other shape of
the paper, B1: `--config.target.name=pvt_v2_b1`, which is cut in depth alone.
"""

from ml_collections import ConfigDict

from mlcollections_configs.post_training import IMAGENET
from mlcollections_configs.up_vits import imagenet_deit_tiny


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = imagenet_deit_tiny.get_config()
  config.network.model = dict(name='pvt_v2_b2')
  config.network.pretrained = 'pvt_v2_b2.in1k'
  decode = dict(size=224, resize=249, interpolation='bicubic')
  config.network.data = dict(name='imagenet2012', test_decode=decode, **IMAGENET)
  config.target = dict(name='pvt_v2_b0', drop_path=0.1)
  config.reported = (
    'ImageNet, PVTv2 cut to the shape of B0: 75.3 %, B0 trained as usual 70.5 %; to that of B1: 79.5 %, B1 '
    '78.7 %.'
  )
  return config
