"""Text and tokens: the tokenizer, prompts and templates, regular expressions."""
