"""ImageNet with 10 % of the labels, ResNet-18; the paper's errors are 41.55 (top-1) and 19.52 % (top-5).

128 labels a class, 128,000 in all (inferred: 10 % of each class are 73 to 130). Reprediction and stepped
learning rates are the paper's, lengths and rates are inferred. The table of pseudo-labels takes 5.1 GB, split
over the devices that share a batch; `rate * alpha / batch size` is that of CIFAR-10.
"""

from ml_collections import ConfigDict

from mlcollections_configs.r2d2 import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = ConfigDict()
  config.data = dict(name='imagenet2012')
  config.labeled = dict(per_class=128)
  config.augment = dict(kind='resized_crop')
  config.model = dict(name='resnet18')
  sgd = dict(name='sgd', momentum=0.9, nesterov=True, weight_decay=1e-4)
  config.supervised = dict(epochs=200, batch_size=256, optimizer=sgd, schedule=dict(base=0.1))
  config.method = dict(labeled_batch=128, repredict=(30, 38, 46, 54), rate=4000.0)
  config.decipher = dict(
    epochs=60,
    batch_size=512,
    optimizer=sgd,
    schedule=embedded.schedule((30, 38, 46, 54), (0.12, 0.12, 0.08, 0.04, 0.004)),
  )
  config.tuning = dict(epochs=20, batch_size=512, optimizer=sgd, schedule=dict(base=0.01))
  config.claims = embedded.claims()
  config.reported = (
    'ImageNet, 10 % of the labels, ResNet-18: error 41.55 % (top-1), 19.52 % (top-5); supervised on the same '
    'labels 52.23 and 27.54 %, on all labels 30.43 and 10.76 %.'
  )
  return config
