"""A fleet on one server: the file, its child processes, one endpoint in front of them. run.py puts it together."""
