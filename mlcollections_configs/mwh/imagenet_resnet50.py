"""mWh with ResNet-50 on ImageNet, 100 epochs, next to mixup and none.

Batches of 256, steps at 30, 60 and 90 epochs, alpha 0.2 and 0.5 [inferred: recalled, not read]. The loss on
plain training images is of the first 50,000. Prepare the data once: `tfds build imagenet2012
--file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.mwh import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.network = dict(
    data=dict(name='imagenet2012'),
    augment=dict(kind='resized_crop', flip_probability=0.5),
    model=dict(name='resnet50'),
    recipe=dict(
      epochs=100,
      batch_size=256,
      optimizer=dict(name='sgd', momentum=0.9, weight_decay=1e-4),
      schedule=dict(name='multistep', base=0.1, milestones=(30, 60, 90), staircase=True),
      eval_every=25020,
    ),
  )
  config.clean_records = 50000
  alpha = dict(granularity='epoch')
  config.mixing = dict(
    none=dict(title='none', schedule='none'),
    always_02=dict(title='mixup, alpha 0.2', schedule='always', alpha=0.2, **alpha),
    always_05=dict(title='mixup, alpha 0.5', schedule='always', alpha=0.5, **alpha),
    mwh_02=dict(title='mWh, alpha 0.2', schedule='mwh', alpha=0.2, **alpha),
    mwh_05=dict(title='mWh, alpha 0.5', schedule='mwh', alpha=0.5, **alpha),
  )
  config.claims = (
    dict(
      statement='alpha 0.5: accuracy at least as high', metric='accuracy', margin=0.0,
      baseline='mixup, alpha 0.5', method='mWh, alpha 0.5',
    ),
  )  # fmt: skip
  config.pictured = ()
  config.log_every = 200
  config.checkpoint_every = 5004
  config.reported = 'No figures at hand; better than mixup at equal epochs, says the abstract.'
  return config
