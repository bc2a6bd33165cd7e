"""A saved posterior as an HTTP service (extra `[serve]`): see docs/serving.md."""

from amortlm.serve.app import create_app as create_app
from amortlm.serve.limits import Limits as Limits
from amortlm.serve.play import create_play as create_play
from amortlm.serve.run import serve as serve
