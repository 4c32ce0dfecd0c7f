"""The classes that handlers derive from."""
