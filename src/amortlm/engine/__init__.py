"""The only package that calls a language model: its passes, the adapter, the decoding loop."""
