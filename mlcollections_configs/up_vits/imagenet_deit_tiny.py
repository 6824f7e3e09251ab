"""UP-DeiT-T: DeiT-B cut to the shape of DeiT-T, trained for 200 epochs of ImageNet.

  python -m experiments.up_vits --config=imagenet_deit_tiny --workdir=gs://...

Of 768 channels, 12 heads and 3072 hidden channels 192, 3 and 768 are left. Constants are those of the
official code: five images a class for the scores, 32 images on each of 8 devices, over which it sums
divergences with the weight 0.2. The full network's weights are timm's. Rows that start anew take the same
recipe, not DeiT's own 300 epochs; the official rate is `--config.recipe.schedule.name=displaced_cosine`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.post_training import imagenet_networks
from mlcollections_configs.up_vits import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.network = network('deit_base')
  config.target = dict(name='deit_tiny_patch16_224', drop_path=0.1)
  config.proxy = dict(per_class=5)
  config.proxy_batch = 512
  config.recipe = dict(
    epochs=200,
    batch_size=256,
    optimizer=dict(name='adamw', weight_decay=1e-3),
    schedule=dict(name='cosine', base=1e-3, warmup_epochs=2),
    precision='bfloat16',
  )
  config.cutmix = 0.5
  config.weight = 0.2 * 32
  config.decay = 0.999
  config.eval_batch_size = 1024
  config.checkpoint_every = 5000
  config.claims = embedded.claims()
  config.reported = embedded.get_config().reported
  return config


def network(name: str) -> dict:
  """Returns a network with public weights, under random resized crops and flips alone."""
  found = imagenet_networks()[name]
  del found['quantization']
  return found | dict(augment=dict(kind='resized_crop', interpolation='bicubic'))
