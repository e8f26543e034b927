"""The command line. Every command that prints has --json. Commands and options are frozen by
tests/serve/test_cli.py."""
