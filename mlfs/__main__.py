"""Runs the command line: `python -m mlfs VERB` is `mlfs VERB`."""

from mlfs.cli import main

raise SystemExit(main())
