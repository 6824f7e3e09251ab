"""Peer-learning with ResNet-50 on WebiNat-5089: 1.2 million images from the web, 36 % of the labels right.

Folders `data/webinat5089/train/CLASS`, clean test images of iNaturalist 2017 in
`data/webinat5089/test/CLASS`; images as in `web_aircraft`. One step of 60 epochs (constants of the official
code; its beta1 falls to 0.1 at epoch 40). The start from ImageNet weights is [inferred]: the official script
draws both networks at random, `--config.pretrained=''`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.peer_learning import web_aircraft


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = web_aircraft.get_config()
  config.data = web_aircraft.folders('data/webinat5089', 5089, 1_184_520)
  config.model = dict(name='resnet50')
  config.pretrained = 'resnet50.tv_in1k'
  config.peer.drop_rate = 0.3
  config.classifier = None
  config.recipe = web_aircraft.recipe(60, 160, 3e-3, 1e-5, 7403)
  config.runs = ('ce', 'peer')
  config.log_every = 200
  config.reported = (
    'ResNet-50 alone 48.23 %, VGG-16 44.77 %, GoogLeNet 39.71 %, '
    'Peer-learning with ResNet-50 54.56 %.'
  )
  return config
