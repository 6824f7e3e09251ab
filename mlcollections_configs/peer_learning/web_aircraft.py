"""Peer-learning with bilinear VGG-16 (ImageNet weights) on Web-aircraft (constants of the official code).

13,503 images from the web in folders `data/web_aircraft/train/CLASS`, the 3333 test images of FGVC-Aircraft
in `data/web_aircraft/test/CLASS`; broken files and duplicates are gone from the published set. Two steps of
200 epochs, classifiers alone, then all layers; Adam with L2, whose beta1 falls to 0.1 at epoch 40. The middle
of images whose shorter side has 512 pixels reaches the device, where 448 are cut at random: the official code
cuts at random along the longer side of images whose shorter one has 448.
"""

from ml_collections import ConfigDict

from mlcollections_configs.photographs import photographs


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = folders('data/web_aircraft', 100, 13_503)
  config.augment = dict(kind='pad_crop', padding=0)
  config.model = dict(name='bcnn_vgg16')
  config.pretrained = 'vgg16.tv_in1k'
  config.peer = dict(drop_rate=0.35, ramp_epochs=10, late_beta1=0.1, late_epoch=40)
  config.classifier = recipe(200, 64, 1e-3, 1e-8, 210)
  config.recipe = recipe(200, 32, 1e-4, 1e-5, 421)
  config.runs = ('ce', 'decoupling', 'co_teaching', 'peer')
  config.log_every = 50
  config.checkpoint_every = 2000
  config.claims = claims()
  config.reported = 'Plain 64.33 %, Decoupling 75.97 %, Co-teaching 72.76 %, Peer-learning 74.38 %.'
  return config


def recipe(epochs: int, batch_size: int, base: float, weight_decay: float, steps: int) -> dict:
  """Returns a recipe of the official code: five epochs of warm-up from 0; `steps` are those of an epoch."""
  return dict(
    epochs=epochs, batch_size=batch_size, eval_every=steps,
    optimizer=dict(name='adam', betas=(0.9, 0.999), weight_decay=weight_decay),
    schedule=dict(name='shifted_cosine', base=base, warmup_epochs=5),
  )  # fmt: skip


def folders(root: str, num_classes: int, train_size: int) -> dict:
  """Returns a data section: folders of photographs of which 448 pixels a side are seen."""
  return photographs(
    'image_folder', root, num_classes, train_size, size=512, view=448, test_resize=448
  )


def claims() -> tuple[dict, ...]:
  """Returns the claims."""
  return (
    dict(
      statement='the better network is at least 4 points above plain training', metric='better', margin=4.0,
      baseline='CE', method='Peer-learning',
    ),
  )  # fmt: skip
