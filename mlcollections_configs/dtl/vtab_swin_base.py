"""DTL on Swin-B of ImageNet-22k and the 19 tasks of VTAB-1k.

  python -m experiments.dtl --config=vtab_swin_base --workdir=DIR

The first two stages are left alone: blocks are read from the fifth on, and added to from the fifteenth.
Else as `vtab_vit_base`, with the learning rates and drop paths of the official scripts for this network.
"""

from ml_collections import ConfigDict

from mlcollections_configs import adaptation
from mlcollections_configs.dtl import vtab_vit_base

TASKS = dict(
  caltech101=(0.001, 0.4, 0.0005, 0.4, 5),
  cifar_100=(0.001, 0.1, 0.003, 0.0, 5),
  clevr_count=(0.0005, 0.4, 0.0005, 0.5, 5),
  clevr_dist=(0.0003, 0.5, 0.0005, 0.5, 5),
  diabetic_retinopathy=(0.0001, 0.5, 0.0003, 0.5, 5),
  dmlab=(0.003, 0.3, 0.003, 0.4, 5),
  dsprites_loc=(0.008, 0.4, 0.01, 0.5, 5),
  dsprites_ori=(0.0005, 0.3, 0.0008, 0.5, 5),
  dtd=(0.0001, 0.4, 0.0008, 0.1, 5),
  eurosat=(0.0008, 0.4, 0.001, 0.3, 5),
  flowers102=(0.001, 0.1, 0.005, 0.1, 5),
  kitti=(0.001, 0.5, 0.005, 0.5, 5),
  patch_camelyon=(0.003, 0.0, 0.005, 0.0, 5),
  pets=(0.0003, 0.1, 0.0001, 0.3, 5),
  resisc45=(0.005, 0.5, 0.003, 0.5, 5),
  smallnorb_azi=(0.003, 0.5, 0.003, 0.5, 5),
  smallnorb_ele=(0.0008, 0.5, 0.001, 0.5, 5),
  sun397=(0.0008, 0.2, 0.003, 0.1, 5),
  svhn=(0.003, 0.4, 0.005, 0.5, 5),
)


def get_config() -> ConfigDict:
  """Returns the settings."""
  config = vtab_vit_base.get_config()
  images = config.target['caltech101']['data'].to_dict()
  config.network = adaptation.public_network(adaptation.SWIN_BASE, images)
  config.pool = 'model'
  config.side = dict(rank=4, extract_from=4, add_from=14, beta=100.0)
  config.tuning = vtab_vit_base.tuning(TASKS) | dict(
    linear=dict(rates=(1e-3,), decays=(1e-4,)), lora=vtab_vit_base.BASELINES
  )
  config.claims = vtab_vit_base.claims(probe=0.0)
  config.reported = (
    'Mean of the three groups on VTAB-1k, Swin-B: about 78 % with 0.09 to 0.13 M trained numbers.'
  )
  return config
