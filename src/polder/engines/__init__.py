"""Adapters to inference engines. Nothing below this package imports one."""
