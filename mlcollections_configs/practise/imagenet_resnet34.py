"""PRACTISE with ResNet-34 on ImageNet: one to three of twelve blocks dropped with 50 to 1000 images.

  python -m experiments.practise --config=imagenet_resnet34 --workdir=gs://...

Adaptors and networks are tuned in 2000 steps of 64 images at 0.02, a tenth of it from 40 % and a hundredth
from 80 % on; labels at 1e-4. Latencies are those of 500 passes of 64 images on one device: run it on the
one that is to be fast. Blocks are scored on the 50 images; the paper's runs score those of each number:
`--config.totals=500 --config.claims=[]`. Its seeds are 2021 to 2025. Images that the network makes of noise:
`--config.origin=synthetic --config.runs=practise,worst,filters` (the paper's are 8000 of ADI's); of another
data set: `--config.origin=other --config.other.name=caltech_birds2011 --config.runs=practise,worst,filters`.
"""

from ml_collections import ConfigDict

from mlcollections_configs.mir.imagenet_resnet34 import imagenet
from mlcollections_configs.practise import embedded

STEPS = dict(steps=2000, batch_size=64, rate=0.02, step_share=0.4, factor=0.1)


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = embedded.get_config()
  config.network = imagenet('resnet34', 'resnet34.tv_in1k')
  config.augment = dict(kind='resized_crop')
  config.totals = (50, 100, 500, 1000)
  config.counts = (1, 2, 3)
  config.recovery = STEPS
  config.tuning = STEPS
  config.price = 'latency'
  config.runs = ('practise', 'worst', 'random', 'labels', 'untuned', 'filters')
  config.timed = 500
  config.timed_batch = 64
  config.claims = embedded.claims(3, 100)
  config.seed = 2021
  return config
