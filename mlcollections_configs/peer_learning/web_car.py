"""Peer-learning with bilinear VGG-16 on Web-car; else as `web_aircraft` (constants of the official code).

21,448 images from the web in folders `data/web_car/train/CLASS`, the 8041 test images of Stanford Cars in
`data/web_car/test/CLASS`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.peer_learning import web_aircraft


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = web_aircraft.get_config()
  config.data = web_aircraft.folders('data/web_car', 196, 21_448)
  config.classifier.eval_every, config.recipe.eval_every = 335, 670
  config.reported = 'Plain 67.42 %, Decoupling 75.00 %, Co-teaching 73.10 %, Peer-learning 78.52 %.'
  return config
