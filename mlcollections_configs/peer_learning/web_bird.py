"""Peer-learning with bilinear VGG-16 on Web-bird; else as `web_aircraft` (constants of the official code).

18,388 images from the web in folders `data/web_bird/train/CLASS`, the 5794 test images of CUB-200-2011 in
`data/web_bird/test/CLASS`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.peer_learning import web_aircraft


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = web_aircraft.get_config()
  config.data = web_aircraft.folders('data/web_bird', 200, 18_388)
  config.classifier.eval_every, config.recipe.eval_every = 287, 574
  config.reported = 'Plain 66.56 %, Decoupling 70.56 %, Co-teaching 73.85 %, Peer-learning 76.48 %.'
  return config
