"""GML over a cross-entropy ResNet-32 on CIFAR-100-LT.

The network has the usual 200 epochs of the CIFAR-LT literature, the classifiers 30 (LWS 5) at learning rate
0.1 along a cosine; the paper's constants for these are not published. LDAM-DRW is a network of its own.
Other ratios: `--config.data.imbalance.ratio=50`. Prepare the data once: `tfds build cifar100
--file_format=array_record`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.gml import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  # The published selection (NumPy's legacy generator, seed 0) out of TFDS' order of the images.
  config.data = dict(
    name='cifar100', imbalance=dict(kind='exponential', max_count=500, ratio=100.0)
  )
  config.groups = dict(many=100, few=20)
  config.augment = dict(kind='pad_crop')
  config.model = dict(name='cifar_resnet32')  # option-A shortcuts
  config.head_init = 'kaiming'

  sgd = dict(name='sgd', momentum=0.9, weight_decay=2e-4)
  # LDAM's: learning rate e / 50 in epoch e = 1 ... 5, a hundredth from 161 and again from 181.
  steps = dict(
    name='multistep', base=0.1, milestones=(160, 180), factor=0.01,
    warmup_epochs=5, warmup_start=0.02, warmup_inclusive=True, staircase=True,
  )  # fmt: skip
  config.network = dict(epochs=200, batch_size=128, optimizer=sgd, schedule=steps)
  cosine = dict(name='cosine', base=0.1)
  config.classifier = dict(epochs=30, batch_size=128, optimizer=sgd, schedule=cosine)
  config.lws = dict(epochs=5, batch_size=128, optimizer=sgd, schedule=cosine)
  config.baselines = dict(
    ldam=dict(
      title='LDAM-DRW',
      loss='ldam',
      head='cosine',
      options=dict(max_margin=0.5, scale=30.0, beta=0.9999, start=160),
    )
  )
  config.runs = ('ce', 'bsce', 'gml', 'bsce_head', 'crt', 'lws', 'ldam')
  config.claims = tuple(c for c in config.claims if c['method'] == 'CE + GML')
  return config
