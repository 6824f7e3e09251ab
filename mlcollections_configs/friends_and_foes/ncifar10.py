"""nCIFAR-10: CIFAR-10 with unequal classes, moved labels, and images of CIFAR-100 in place of a part.

All constants are [inferred] (see the module; optimizer as in DivideMix's recipe): ResNet-18 with a stem for
small images, 400 epochs of SimSiam, 10 of warm-up, 300 of training. Classes of CIFAR-100 that look like those
of CIFAR-10 are left out. Other cells of the grid: `--config.data.open.closed_rate=0.4`, `open_rate=0.4`,
`imbalance=1`. Prepare the data once: `tfds build cifar10 --file_format=array_record`, likewise `cifar100`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.friends_and_foes import embedded

CIFAR100_LIKE_CIFAR10 = (13, 42, 43, 58, 81, 88, 89, 97)


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.data = dict(
    name='cifar10',
    open=dict(
      name='cifar100', closed_rate=0.2, open_rate=0.2, max_count=5000, imbalance=10.0,
      without=CIFAR100_LIKE_CIFAR10,
    ),
  )  # fmt: skip
  config.augment = dict(kind='pad_crop', padding=4)
  config.model = dict(name='cifar_resnet18')
  config.ssl = dict(
    augment=dict(
      kind='resized_crop', scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_probability=0.8,
      grayscale_probability=0.2,
    ),
    heads=dict(hidden=2048, features=2048, predictor=512),
    recipe=dict(
      epochs=400, batch_size=512, optimizer=dict(name='sgd', momentum=0.9, weight_decay=5e-4),
      schedule=dict(name='cosine', base=0.06),
    ),
  )  # fmt: skip
  config.warmup.update(epochs=10, batch_size=128)
  config.recipe.update(
    epochs=300, batch_size=128, eval_every=159,
    schedule=dict(name='multistep', base=0.02, milestones=(150,), factor=0.1),
  )  # fmt: skip
  config.runs = ('ce', 'ff', 'semi', 'no_ssl', 'full_warmup', 'no_filter', 'no_correction')
  config.log_every = 159
  return config
