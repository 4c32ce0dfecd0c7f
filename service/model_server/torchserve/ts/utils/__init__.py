"""What handlers use from ``ts.utils``."""
