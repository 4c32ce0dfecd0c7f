"""Serves one model bundle over Unix sockets.

A parent process verifies and loads the bundle once and forks the workers, which share the weights copy-on-write.
``docs/contracts.md`` says what comes in and goes out.
"""
