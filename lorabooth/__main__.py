"""`python -m lorabooth` is the command `lorabooth`."""

from __future__ import annotations

from lorabooth.cli.app import main

main()
