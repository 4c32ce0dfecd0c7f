"""The lab: a container with systemd as PID 1 and its own Docker, standing in for an EC2-style host.

Standard library only, because it runs before any virtual environment exists.
"""
