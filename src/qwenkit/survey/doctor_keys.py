"""The keys that programs read in the configuration files of this family's checkpoints."""

from __future__ import annotations


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Of config.json: of the first generation only, of later ones only, of mixtures of experts, of all.
FIRST = _keys(
    """attn_dropout_prob bf16 emb_dropout_prob ffn_hidden_size fp16 fp32 kv_channels
    layer_norm_epsilon n_embd n_head n_inner n_layer n_positions no_bias onnx_safe
    position_embedding_type rotary_emb_base rotary_pct scale_attn_weights seq_length
    softmax_in_fp32 use_cache_kernel use_cache_quantization use_dynamic_ntk use_flash_attn
    use_logn_attn"""
)
LATER = _keys(
    """attention_bias attention_dropout head_dim hidden_act layer_types max_window_layers mlp_bias
    num_key_value_heads rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window
    use_qk_norm use_sliding_window"""
)
EXPERTS = _keys(
    """decoder_sparse_step mlp_only_layers moe_intermediate_size norm_topk_prob num_experts
    num_experts_per_tok output_router_logits router_aux_loss_coef shared_expert_intermediate_size"""
)
_SHARED = _keys(
    """_name_or_path architectures auto_map bos_token_id dtype dual_chunk_attention_config
    eos_token_id hidden_size initializer_range intermediate_size max_position_embeddings model_type
    num_attention_heads num_hidden_layers original_max_position_embeddings pad_token_id
    partial_rotary_factor pretraining_tp quantization_config tie_word_embeddings tokenizer_class
    torch_dtype transformers_version use_cache vocab_size"""
)
CONFIG = _SHARED | FIRST | LATER | EXPERTS
BIASES = _keys("attention_bias mlp_bias")  # set in some architectures, fixed in others
FIRST_SWITCHES = _keys("seq_length use_dynamic_ntk use_logn_attn")

ROPE_SCALING = _keys(
    """attention_factor beta_fast beta_slow factor finetuned high_freq_factor long_factor
    low_freq_factor mscale mscale_all_dim original_max_position_embeddings partial_rotary_factor
    rope_theta rope_type short_factor truncate type"""
)
GENERATION = _keys(
    """bos_token_id chat_format do_sample eos_token_id length_penalty max_context_size max_length
    max_new_tokens max_window_size min_new_tokens min_p num_beams pad_token_id repetition_penalty
    stop_words_ids temperature top_k top_p transformers_version typical_p use_cache"""
)
TOKENIZER = _keys(
    """add_bos_token add_eos_token add_prefix_space added_tokens_decoder additional_special_tokens
    auto_map bos_token chat_template clean_up_tokenization_spaces eos_token errors model_max_length
    pad_token padding_side split_special_tokens tokenizer_class unk_token"""
)
