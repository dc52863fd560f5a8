"""The models: config, tokenizer, modeling and pipeline. These files travel to the Hub as remote code.

They import no private name. What they override or read of transformers with an underscore (read in 5.23.0 and 5.24.0):

- `PreTrainedModel`: what every model file of transformers sets (`_init_weights`, `_no_split_modules`, `_supports_*`,
  `_can_compile_fullgraph`, `_can_record_outputs`, `_tied_weights_keys`, `_tp_plan`, `_ep_plan`, `_fsdp_plan`); besides
  `_can_set_experts_implementation` (the experts stand in another file than the model), `_finalize_model_loading`
  (missing experts are refused), and `_resize_token_embeddings` with `_get_resized_embeddings` (untied embeddings);
- `GenerationMixin._prepare_generation_config`: a length for who gives none;
- `PreTrainedConfig`: `_attn_implementation`, as every attention of transformers reads it;
- `TokenizersBackend`: `_tokenizer`, `_add_tokens`, `_encode_plus`, `_special_tokens_map`, `_extra_special_tokens`,
  `_auto_map` (the tags of languages; one call at a time), and `_switch_to_input_mode`, `_switch_to_target_mode` and
  `_build_translation_inputs`, which tokenizers for translation have;
- `Pipeline`: its contract (`_sanitize_parameters`, `_forward`, `_load_*`, `_pipeline_calls_generate`,
  `_prepare_generate_kwargs`, `_default_generation_config`), and `_preprocess_params` and `_registered_impl`, from which
  `save_pretrained` writes what a loaded pipeline is.

Of PyTorch: `nn.Module._apply`, for what no checkpoint holds (`to_empty` would leave memory as it is).
"""
