"""SSQL with CIFAR ResNet-18 on CIFAR-10, the paper's setting (constants of the official code).

400 epochs at batch 512, the linear probe for 100. `norm_groups=4` is the batch norm of the authors' four GPUs
with 128 images each. Prepare the data once: `tfds build cifar10 --file_format=array_record`.
For CIFAR-100: `--config.data.name=cifar100`; BYOL: `--config.base=byol`. MoCo v2 differs in more: see
`cifar10_moco.py`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.ssql import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()

  config.data = dict(name='cifar10')
  config.augment = dict(
    kind='resized_crop',
    scale=(0.2, 1.0),
    jitter=(0.4, 0.4, 0.4, 0.1),
    jitter_probability=0.8,
    grayscale_probability=0.2,
  )

  config.base = 'simsiam'
  config.model = dict(name='cifar_resnet18', norm_groups=4)
  config.heads = dict(hidden=2048, features=2048, predictor=2048)

  config.recipe = dict(
    epochs=400,
    batch_size=512,
    optimizer=dict(name='sgd', momentum=0.9, weight_decay=5e-4),
    schedule=dict(name='cosine_per_epoch', base=0.05),
  )
  config.log_every = 50
  config.checkpoint_every = 2000

  probe = dict(learning_rate=30.0, epochs=100, batch_size=512, milestones=(60, 80))
  config.eval = dict(
    bits=('8w8a', '5w5a', '4w4a', '3w3a', '2w4a'),
    calibration=128,
    k=200,
    probe=dict(name='sgd', options=probe),
  )
  config.claims = embedded.get_config().claims
  return config
