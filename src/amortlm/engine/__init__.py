"""The only room that calls a language model: its passes, the adapter, the decoding loop."""
