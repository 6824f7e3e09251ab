"""Networks over tokens: their published sizes, and from configurations of Hugging Face's transformers."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from jaxlab.models.bert import Bert
from jaxlab.models.bloom import Bloom
from jaxlab.models.gpt2 import GPT2
from jaxlab.models.llama import Llama
from jaxlab.models.rotary import RotaryScaling

TOKEN_MODELS = GPT2 | Bloom | Llama | Bert

_QWEN2_5_TIED = {'vocab_size': 151936, 'tied': True}


def _qwen2_5(
  width: int, depth: int, num_heads: int, num_kv_heads: int, hidden: int, **others: Any
) -> tuple[type[nn.Module], dict[str, Any]]:
  sizes = {'width': width, 'depth': depth, 'num_heads': num_heads, 'num_kv_heads': num_kv_heads}
  shared = {'vocab_size': 152064, 'max_length': 32768, 'rope_theta': 1e6, 'attention_bias': 'qkv'}
  return Llama, {**sizes, 'hidden': hidden, **shared, **others}


_LLAMA3_1 = {
  'max_length': 131072,
  'vocab_size': 128256,
  'num_kv_heads': 8,
  'rope_theta': 500000.0,
  'rope_scaling': RotaryScaling(),
  'epsilon': 1e-5,
}
_XLM_ROBERTA = {
  'vocab_size': 250002,
  'max_length': 514,
  'token_types': 1,
  'first_position': 2,
  'epsilon': 1e-5,
}
# Devlin et al. 2019, section 3; Wang et al. 2020 (arXiv 2002.10957), six of MiniLM's layers; Conneau et al.
# 2020 (arXiv 1911.02116), table 5; Radford et al. 2019, table 2; Le Scao et al. 2022 (arXiv 2211.05100);
# Touvron et al. 2023 (arXiv 2302.13971), table 2 and (2307.09288), table 1; Llama team 2024 (arXiv
# 2407.21783), table 3; Qwen team 2024 (arXiv 2412.15115), table 1.
SIZES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
  'gpt2': (GPT2, {'width': 768, 'depth': 12, 'num_heads': 12}),
  'gpt2_medium': (GPT2, {'width': 1024, 'depth': 24, 'num_heads': 16}),
  'gpt2_large': (GPT2, {'width': 1280, 'depth': 36, 'num_heads': 20}),
  'gpt2_xl': (GPT2, {'width': 1600, 'depth': 48, 'num_heads': 25}),
  'bloom_560m': (Bloom, {'width': 1024, 'depth': 24, 'num_heads': 16}),
  'bloom_7b1': (Bloom, {'width': 4096, 'depth': 30, 'num_heads': 32}),
  'bert_base': (Bert, {'width': 768, 'depth': 12, 'num_heads': 12}),
  'bert_large': (Bert, {'width': 1024, 'depth': 24, 'num_heads': 16}),
  'minilm_l6': (Bert, {'width': 384, 'depth': 6, 'num_heads': 12}),
  'xlm_roberta_base': (Bert, {**_XLM_ROBERTA, 'width': 768, 'depth': 12, 'num_heads': 12}),
  'xlm_roberta_large': (Bert, {**_XLM_ROBERTA, 'width': 1024, 'depth': 24, 'num_heads': 16}),
  'llama': (Llama, {'width': 4096, 'depth': 32, 'num_heads': 32, 'hidden': 11008}),
  'llama2_7b': (
    Llama,
    {'width': 4096, 'depth': 32, 'num_heads': 32, 'hidden': 11008, 'max_length': 4096}
    | {'epsilon': 1e-5},
  ),
  'llama2_13b': (
    Llama,
    {'width': 5120, 'depth': 40, 'num_heads': 40, 'hidden': 13824, 'max_length': 4096}
    | {'epsilon': 1e-5},
  ),
  'llama3_8b': (
    Llama,
    {'width': 4096, 'depth': 32, 'num_heads': 32, 'hidden': 14336, 'max_length': 8192}
    | {'vocab_size': 128256, 'num_kv_heads': 8, 'rope_theta': 500000.0, 'epsilon': 1e-5},
  ),
  'llama3_1_8b': (
    Llama,
    {'width': 4096, 'depth': 32, 'num_heads': 32, 'hidden': 14336, **_LLAMA3_1},
  ),
  'llama3_3_70b': (
    Llama,
    {'width': 8192, 'depth': 80, 'num_heads': 64, 'hidden': 28672, **_LLAMA3_1},
  ),
  'qwen2_5_0_5b': _qwen2_5(896, 24, 14, 2, 4864, **_QWEN2_5_TIED),
  'qwen2_5_1_5b': _qwen2_5(1536, 28, 12, 2, 8960, **_QWEN2_5_TIED),
  'qwen2_5_7b': _qwen2_5(3584, 28, 28, 4, 18944),
  'qwen2_5_14b': _qwen2_5(5120, 48, 40, 8, 13824, epsilon=1e-5),
  'qwen2_5_32b': _qwen2_5(5120, 64, 40, 8, 27648, epsilon=1e-5),
}

# Name in transformers' configuration -> field, and what transformers takes where it is absent.
_GPT2_FIELDS = {
  'vocab_size': ('vocab_size', 50257),
  'n_positions': ('max_length', 1024),
  'n_embd': ('width', 768),
  'n_layer': ('depth', 12),
  'n_head': ('num_heads', 12),
  'n_inner': ('hidden', None),
  'layer_norm_epsilon': ('epsilon', 1e-5),
  'tie_word_embeddings': ('tied', True),
}
_BLOOM_FIELDS = {
  'vocab_size': ('vocab_size', 250880),
  'hidden_size': ('width', 64),
  'n_layer': ('depth', 2),
  'n_head': ('num_heads', 8),
  'seq_length': ('max_length', 2048),
  'layer_norm_epsilon': ('epsilon', 1e-5),
  'tie_word_embeddings': ('tied', True),
}
# Names that a file may have in place of those above.
_BLOOM_NAMES = {
  'n_embed': 'hidden_size',
  'num_attention_heads': 'n_head',
  'num_hidden_layers': 'n_layer',
}
_GELUS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}
_LLAMA_FIELDS = {
  'vocab_size': ('vocab_size', 32000),
  'hidden_size': ('width', 4096),
  'num_hidden_layers': ('depth', 32),
  'num_attention_heads': ('num_heads', 32),
  'num_key_value_heads': ('num_kv_heads', None),
  'head_dim': ('head_width', None),
  'intermediate_size': ('hidden', 11008),
  'max_position_embeddings': ('max_length', 2048),
  'rms_norm_eps': ('epsilon', 1e-6),
  'tie_word_embeddings': ('tied', False),
  'attention_bias': ('attention_bias', False),
  'mlp_bias': ('mlp_bias', False),
}
_ROPE_FIELDS = {
  'factor': 'factor',
  'low_freq_factor': 'low',
  'high_freq_factor': 'high',
  'original_max_position_embeddings': 'length',
}
_BERT_FIELDS = {
  'vocab_size': ('vocab_size', 30522),
  'hidden_size': ('width', 768),
  'num_hidden_layers': ('depth', 12),
  'num_attention_heads': ('num_heads', 12),
  'intermediate_size': ('hidden', 3072),
  'max_position_embeddings': ('max_length', 512),
  'type_vocab_size': ('token_types', 2),
  'layer_norm_eps': ('epsilon', 1e-12),
}
# Model types of BERT's function with defaults of their own; positions of some start behind the padding's.
_BERTS: dict[str, dict[str, Any]] = {
  'bert': {},
  'roberta': {'vocab_size': 50265, 'pad_token_id': 1},
  'xlm-roberta': {'pad_token_id': 1},
  'camembert': {'pad_token_id': 1},
}
# Options that would change the function; every other value than these is refused.
_GPT2_FIXED = {
  'scale_attn_weights': True,
  'scale_attn_by_inverse_layer_idx': False,
  'add_cross_attention': False,
}
_BLOOM_FIXED = {'apply_residual_connection_post_layernorm': False}
_BERT_FIXED = {
  'position_embedding_type': 'absolute',
  'is_decoder': False,
  'add_cross_attention': False,
}
_LLAMA_FIXED = {'hidden_act': 'silu'}
_QWEN2_FIXED = {'hidden_act': 'silu', 'use_sliding_window': False}
# What Qwen2's configuration takes where Llama's has another default.
_QWEN2 = {
  'vocab_size': 151936,
  'intermediate_size': 22016,
  'max_position_embeddings': 32768,
}


def from_config(config: Mapping[str, Any] | str | os.PathLike, **overrides: Any) -> TOKEN_MODELS:
  """Returns the network that a `config.json` of transformers describes.

  Known are BERT, RoBERTa, GPT-2, BLOOM, Llama and Qwen2.

  Entries that do not concern the network's function (token ids, rates of dropout, initial deviations) are
  ignored; what is absent has transformers' default.

  Args:
    config: the entries, their JSON text, or the path of the file. Without `model_type` the family is told by
      `n_embd` (GPT-2), `n_embed` (BLOOM), `type_vocab_size` (BERT) or `hidden_size` (Llama).
    **overrides: fields of the module, e.g. `dtype` and `remat`. A `Bert` has a classifier of each token if
      the configuration is of one, or with `num_classes`.

  Raises:
    ValueError: for another family, or an option that the network does not have (another scaling of rotary
      positions than Llama 3.1's, another activation).

  >>> from_config('{"n_embd": 64, "n_layer": 3, "n_head": 4}', remat=True).depth
  3
  """
  config = _read(config)
  family = config.get('model_type')
  marks = {'n_embd': 'gpt2', 'n_embed': 'bloom', 'type_vocab_size': 'bert', 'hidden_size': 'llama'}
  family = family or next((kind for name, kind in marks.items() if name in config), None)
  if family == 'gpt2':
    _refuse_others(config, _GPT2_FIXED)
    activation = _gelu(config, 'activation_function', 'gelu_new')
    fields = {**_fields(config, _GPT2_FIELDS), 'activation': activation}
    return GPT2(**{**fields, **overrides})
  if family == 'bloom':
    config = {_BLOOM_NAMES.get(name, name): value for name, value in config.items()}
    _refuse_others(config, _BLOOM_FIXED)
    return Bloom(**{**_fields(config, _BLOOM_FIELDS), **overrides})
  if family in _BERTS:
    config = {**_BERTS[family], **config}
    _refuse_others(config, _BERT_FIXED)
    fields = {**_fields(config, _BERT_FIELDS), 'activation': _gelu(config, 'hidden_act', 'gelu')}
    if 'pad_token_id' in _BERTS[family]:
      fields['first_position'] = config['pad_token_id'] + 1
    if any(kind.endswith('ForTokenClassification') for kind in config.get('architectures') or ()):
      fields['num_classes'] = config.get('num_labels', len(config.get('id2label', '01')))
    return Bert(**{**fields, **overrides})
  if family in ('llama', 'qwen2'):
    _refuse_others(config, _LLAMA_FIXED if family == 'llama' else _QWEN2_FIXED)
    if family == 'qwen2':
      # Its biases are no option.
      config = {**_QWEN2, **config, 'attention_bias': 'qkv', 'mlp_bias': False}
    theta, scaling = _rope(config)
    fields = {**_fields(config, _LLAMA_FIELDS), 'rope_theta': theta, 'rope_scaling': scaling}
    return Llama(**{**fields, **overrides})
  known = ', '.join(map(repr, ('gpt2', 'bloom', 'llama', 'qwen2', *_BERTS)))
  raise ValueError(
    f'from_config knows the model types {known}; got {family!r} '
    f'(entries: {", ".join(sorted(config)[:8])}).'
  )


def to_config(model: Bert, pad: int | None = None) -> dict[str, Any]:
  """Returns the `config.json` of transformers that describes a BERT or RoBERTa: `from_config`'s inverse.

  Args:
    model: with `num_classes` a classifier of tokens; RoBERTa if its first position is not 0.
    pad: id of padding; None: RoBERTa's is told by its first position, BERT's is 0.

  Raises:
    ValueError: for another network, an activation that transformers lacks, or a RoBERTa with another padding.

  >>> from_config(to_config(Bert(num_classes=2, depth=3))) == Bert(
  ...   num_classes=2, depth=3, hidden=3072
  ... )
  True
  """
  if not isinstance(model, Bert):
    raise ValueError(f'to_config describes a Bert, got {type(model).__name__}.')
  names = {ours: theirs for theirs, ours in _GELUS.items()}
  if model.activation not in names:
    raise ValueError(f'to_config: activation={model.activation!r} is none of {sorted(names)}.')
  family = 'xlm-roberta' if model.first_position else 'bert'
  pad = (model.first_position - 1 if model.first_position else 0) if pad is None else pad
  if model.first_position not in (0, pad + 1):
    raise ValueError(
      f'to_config: first_position={model.first_position} is not behind the padding {pad}.'
    )
  own = {theirs: getattr(model, ours) for theirs, (ours, _) in _BERT_FIELDS.items()}
  own |= {'intermediate_size': model.hidden or 4 * model.width, 'pad_token_id': pad}
  kind = {'bert': 'Bert', 'xlm-roberta': 'XLMRoberta'}[family]
  suffix = 'Model' if model.num_classes is None else 'ForTokenClassification'
  if model.num_classes is not None:
    own['num_labels'] = model.num_classes
  return {
    'architectures': [kind + suffix],
    'model_type': family,
    'hidden_act': names[model.activation],
    **own,
  }


def _read(config: Mapping[str, Any] | str | os.PathLike) -> Mapping[str, Any]:
  if isinstance(config, Mapping):
    return config
  text = os.fspath(config)
  if not text.lstrip().startswith('{'):
    text = pathlib.Path(text).read_text(encoding='utf-8')
  return json.loads(text)


def _fields(config: Mapping[str, Any], names: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
  return {field: config.get(name, default) for name, (field, default) in names.items()}


def _gelu(config: Mapping[str, Any], name: str, default: str) -> str:
  """Returns our name of the GELU that the entry `name` tells."""
  activation = config.get(name, default)
  if activation not in _GELUS:
    raise ValueError(f'from_config: {name}={activation!r} is not supported, only {sorted(_GELUS)}.')
  return _GELUS[activation]


def _refuse_others(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
  for name, value in fixed.items():
    if config.get(name, value) != value:
      raise ValueError(f'from_config: {name}={config[name]!r} is not supported, only {value!r}.')


def _rope(config: Mapping[str, Any]) -> tuple[float, RotaryScaling | None]:
  """Reads rotary base and scaling, of transformers 5 from `rope_parameters`."""
  rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
  theta = float(rope.get('rope_theta', config.get('rope_theta', 10000.0)))
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind == 'default':
    return theta, None
  if kind != 'llama3':
    raise ValueError(
      f"from_config: rotary positions scaled by {kind!r} are not supported, only 'llama3'."
    )
  length = config.get('max_position_embeddings', _LLAMA_FIELDS['max_position_embeddings'][1])
  given = {'original_max_position_embeddings': length, **rope}
  if missing := [name for name in _ROPE_FIELDS if name not in given]:
    raise ValueError(f"from_config: rotary positions scaled by 'llama3' lack {', '.join(missing)}.")
  return theta, RotaryScaling(**{ours: given[name] for name, ours in _ROPE_FIELDS.items()})
