"""QwT-v2 against quantization alone and QwT, on the small networks of QwT's embedded setting.

  python -m experiments.qwt_v2

The teacher is the float network's own activation, which at few bits is the better one (measured on seeds 10
and 11); QwT's, the float layer on the quantized network's input, is a variant, and so is compensation of the
block's output alone. Ranges are found anew on as many images as at first.
"""

from ml_collections import ConfigDict

from mlcollections_configs.qwt import embedded


def get_config() -> ConfigDict:
  """Returns the configuration."""
  config = embedded.get_config()
  config.qwt.fine_tuning = None
  config.calibration.batch_size = config.calibration.ranges
  config.qwt_v2 = dict(
    method=dict(granularity='linear'),
    options=dict(dtype='float32', target='global'),
    variants={
      'QwT-v2, local teacher': dict(options=dict(target='local')),
      'QwT-v2, blocks': dict(method=dict(granularity='block')),
    },
  )
  config.claims = (
    embedded.gain('QwT-v2', 'vit', '2w3a', 2.0),
    embedded.gain('QwT-v2', 'resnet', '2w3a', 0.0),
    *(
      embedded.lower('QwT-v2', network, '2w3a', 0.1)
      for network in ('vit', 'vit_massive', 'resnet', 'text')
    ),
    *(
      embedded.gain('QwT-v2', network, bits, -0.5)
      for network in ('vit', 'resnet')
      for bits in ('4w4a', '8w8a')
    ),
  )
  return config
