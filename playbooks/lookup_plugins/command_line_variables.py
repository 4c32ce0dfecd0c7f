"""The names of the variables that were given on the command line, which Ansible otherwise mixes with all others."""

from __future__ import annotations

from ansible.plugins.lookup import LookupBase
from ansible.utils.vars import load_extra_vars

DOCUMENTATION = """
name: command_line_variables
short_description: Names of the variables that --extra-vars gave
description: Returns the names, sorted, those from files included.
"""


class LookupModule(LookupBase):
    """Takes no terms."""

    def run(self, terms, variables=None, **kwargs):
        """The names as a list."""
        return sorted(load_extra_vars(self._loader))
