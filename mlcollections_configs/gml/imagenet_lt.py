"""GML over a cross-entropy ResNet-50 on ImageNet-LT.

90 epochs for the network; 30 for the classifiers at batch 256, learning rate 0.1 along a cosine, weight decay
5e-4 (the paper's are not published). cRT and LWS as Kang et al. 2020: batch 512, learning rate 0.2, 10 and 5
epochs. ResNeXt-50: `--config.model.name=resnext50_32x4d`. tau is chosen on the validation list.
"""

from ml_collections import ConfigDict

from mlcollections_configs.gml import embedded


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.data = dict(name='ImageNet_LT')
  config.groups = dict(many=100, few=20)
  config.augment = dict(kind='resized_crop', scale=(0.08, 1.0), jitter=(0.4, 0.4, 0.4, 0.0))
  config.model = dict(name='resnet50')

  sgd = dict(name='sgd', momentum=0.9, weight_decay=5e-4)
  cosine, higher = dict(name='cosine', base=0.1), dict(name='cosine', base=0.2)
  config.network = dict(epochs=90, batch_size=256, optimizer=sgd, schedule=cosine)
  config.classifier = dict(epochs=30, batch_size=256, optimizer=sgd, schedule=cosine)
  config.crt = dict(epochs=10, batch_size=512, optimizer=sgd, schedule=higher)
  config.lws = dict(epochs=5, batch_size=512, optimizer=sgd, schedule=higher)
  config.checkpoint_every = 5000
  config.claims = tuple(c for c in config.claims if c['method'] == 'CE + GML')
  return config
