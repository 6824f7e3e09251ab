"""Parameter-efficient tuning: functions around a frozen, untouched network.

An adapter is a variable collection of its own (`init_*`), and hooks that work with it (`*_hooks`):

  lora = adapters.init_lora(key, params, layers, rank=8)
  y = models.apply(model, {'params': params, 'lora': lora}, x, hooks=adapters.lora_hooks(layers))

`jax.grad` with respect to the collection trains nothing else. LoRA and SSF merge back into the parameters.
`apply_side_network` runs DTL's side network next to a transformer. LAST's reads the tokens that
`collect_features` took, and MIST's edge network reads one tensor that was made of them (`gather_sum`).

Names load with the files that they are in: an edge device, which has features and no network, never loads
`jaxlab.models`.
"""

import importlib
from typing import Any

_FILES = {
  'accounting': ('bias_mask', 'count_parameters', 'residual_bytes'),
  'attention_side_network': ('apply_attention_side_network', 'init_attention_side_network'),
  'bottleneck': (
    'adapter_hooks',
    'adaptformer_hooks',
    'block_widths',
    'init_adapters',
    'init_adaptformer',
  ),
  'collect': ('collect_features',),
  'edge_network': ('apply_edge_network', 'init_edge_network', 'multiply_adds'),
  'gather': (
    'gather_concat',
    'gather_last',
    'gather_sum',
    'leading_layers',
    'spaced_layers',
    'split_layers',
    'transfer_bytes',
  ),
  'low_rank': ('init_lora', 'lora_hooks', 'merge_lora'),
  'low_rank_modules': (
    'init_head',
    'init_low_rank_attention',
    'init_low_rank_mlp',
    'init_modules',
    'low_rank_attention',
    'low_rank_mlp',
    'normalize_tokens',
    'pool_tokens',
    'run_modules',
    'token_logits',
  ),
  'pooling': ('mean_patch_hooks',),
  'prompts': ('init_prompts', 'insert_prompts', 'prompt_hooks', 'replace_prompts'),
  'scale_shift': ('init_ssf', 'merge_ssf', 'ssf_hooks', 'ssf_modules'),
  'side_network': (
    'apply_side_network',
    'extract_side',
    'fuse_side',
    'init_side_network',
    'swish',
  ),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}

__all__ = sorted(_FILE_OF)


def __getattr__(name: str) -> Any:
  if name not in _FILE_OF:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  found = getattr(importlib.import_module(f'{__name__}.{_FILE_OF[name]}'), name)
  globals()[name] = found
  return found


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
