"""Bridges to other libraries. Each is an optional extra, imported from its own module."""
