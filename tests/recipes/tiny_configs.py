"""The smallest models that the recipes can train."""

TINY_CLASSIFIER = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
TINY_TRANSLATOR = {
    "model_type": "m2m_100",
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 32,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
TINY_DECODER = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
TINY_PARSER = {"model_type": "transition_parser", "embedding_size": 4, "hidden_size": 8}
TINY_TRANSFORMER_XL = {"model_type": "xlnet", "attn_type": "uni", "bi_data": False, "mem_len": 16, "dropout": 0.0}
TINY_TRANSFORMER_XL |= {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
