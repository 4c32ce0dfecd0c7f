"""What the commands of this package say before they give up."""


class DriftError(Exception):
    """Something that its operator can put right; the message names the file or field, the value and what to do."""
