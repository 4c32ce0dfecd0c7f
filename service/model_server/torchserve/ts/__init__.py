"""Stands in for TorchServe's package: what handlers import from it, written for this service."""
