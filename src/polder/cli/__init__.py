"""The command line. Every verb that prints has --json; verbs and flags are frozen by tests/serve/test_cli.py."""
