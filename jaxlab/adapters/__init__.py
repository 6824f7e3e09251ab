"""Parameter-efficient tuning: functions around a frozen, untouched network.

An adapter is a variable collection of its own (`init_*`), and hooks that work with it (`*_hooks`):

  lora = adapters.init_lora(key, params, layers, rank=8)
  y = models.apply(model, {'params': params, 'lora': lora}, x, hooks=adapters.lora_hooks(layers))

`jax.grad` with respect to the collection trains nothing else. LoRA and SSF merge back into the parameters.
`apply_side_network` runs DTL's side network next to a transformer.
"""

from jaxlab.adapters.accounting import (
  bias_mask,
  count_parameters,
  residual_bytes,
)
from jaxlab.adapters.bottleneck import (
  adapter_hooks,
  adaptformer_hooks,
  block_widths,
  init_adapters,
  init_adaptformer,
)
from jaxlab.adapters.low_rank import (
  init_lora,
  lora_hooks,
  merge_lora,
)
from jaxlab.adapters.prompts import (
  init_prompts,
  insert_prompts,
  prompt_hooks,
  replace_prompts,
)
from jaxlab.adapters.scale_shift import (
  init_ssf,
  merge_ssf,
  ssf_hooks,
  ssf_modules,
)
from jaxlab.adapters.side_network import (
  apply_side_network,
  extract_side,
  fuse_side,
  init_side_network,
  swish,
)

__all__ = [
  'adapter_hooks',
  'adaptformer_hooks',
  'apply_side_network',
  'bias_mask',
  'block_widths',
  'count_parameters',
  'extract_side',
  'fuse_side',
  'init_adapters',
  'init_adaptformer',
  'init_lora',
  'init_prompts',
  'init_side_network',
  'init_ssf',
  'insert_prompts',
  'lora_hooks',
  'merge_lora',
  'merge_ssf',
  'prompt_hooks',
  'replace_prompts',
  'residual_bytes',
  'ssf_hooks',
  'ssf_modules',
  'swish',
]
