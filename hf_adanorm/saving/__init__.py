"""How patched models are saved and loaded: the spec, the hooks in transformers and PEFT, the model card, the files."""
