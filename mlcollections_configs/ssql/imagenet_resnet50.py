"""SSQL with ResNet-50 on ImageNet, the paper's setting (constants of the official code).

100 epochs at batch 256 with statistics over the whole batch (SyncBN), the linear probe with LARS for 60.
Prepare the data once: `tfds build imagenet2012 --file_format=array_record`. Images are decoded to 256x256
(shorter side, center) on the host and cropped from there on the device; the official code crops from the
full photograph. For 200 epochs: `--config.recipe.epochs=200`.
"""

from ml_collections import ConfigDict

from mlcollections_configs import views
from mlcollections_configs.ssql import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.data = dict(name='imagenet2012')
  config.augment = views.photographs()

  config.base = 'simsiam'
  config.model = dict(name='resnet50', zero_init_residual=True)
  config.heads = dict(hidden=2048, features=2048, predictor=512)

  config.recipe = dict(
    epochs=100,
    batch_size=256,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
    schedule=dict(name='cosine_per_epoch', base=0.05),
  )
  config.log_every = 50
  config.checkpoint_every = 5000

  config.eval_batch_size = 1024
  config.eval = dict(
    bits=('8w8a', '5w5a', '4w4a', '3w3a', '2w4a'),
    calibration=256,
    k=200,
    probe=dict(name='lars', options=dict(learning_rate=0.1, epochs=60, batch_size=4096)),
  )
  config.claims = embedded.get_config().claims
  return config
