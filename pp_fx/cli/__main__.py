"""`python -m pp_fx.cli`."""

from . import main

main()
